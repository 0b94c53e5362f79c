"""Cityscapes, HRNetV2-W48, centre regulariser: no number known. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_centres_40k.py --num-gpus 4

The centre regulariser of Zhong et al., CVPR 2023, with the weight of its release for ADE20K; images
of a class are counted as they come.
"""

from ..common.contrast.comparators import centres as _centres
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_centres, "concat", _joined("concat"))
train.output_dir = "output/cityscapes/fcn_hrnet48_centres_40k"
