"""Cityscapes, HRNetV2-W48, region contrast: no number known. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_region_40k.py --num-gpus 4

Region contrast by its equations, of which we have a translation without the experiments; the
similarities of its release are element-wise products, which do not contrast. The number that Table
2 of Pissas et al., ECCV 2022, cites has no schedule.
"""

from ..common.contrast.comparators import region as _region
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_region, "concat", _joined("concat"))
train.output_dir = "output/cityscapes/fcn_hrnet48_region_40k"
