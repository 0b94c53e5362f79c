"""Cityscapes, HRNetV2-W48, pixel contrast within the batch, with the anchors of Wang et al., ICCV
2021. The paper's number is with a memory; its release, without one, has 80.2 mIoU with anchors as
in fcn_hrnet48_pixel_release_40k.py. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pixel_40k.py --num-gpus 4
"""

from ..common.contrast.pixel import pixel as _pixel
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel, "concat", _joined("concat"))
train.output_dir = "output/cityscapes/fcn_hrnet48_pixel_40k"
