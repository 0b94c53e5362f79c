"""Cityscapes, HRNetV2-W48, pixel contrast within the batch, as released: 80.2 mIoU in the release
of Wang et al., ICCV 2021. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pixel_release_40k.py --num-gpus 4
"""

from ..common.contrast.pixel import pixel_release as _pixel_release
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel_release, "concat", _joined("concat"))
model.contrast.max_anchors = 4096  # the release's 1,024 on each of four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_pixel_release_40k"
