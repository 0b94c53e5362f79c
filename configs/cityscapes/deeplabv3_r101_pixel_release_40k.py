r"""Cityscapes, DeepLabV3 on ResNet-101, pixel contrast within the batch, on C5, as released: 77.67
mIoU in the release of Wang et al., ICCV 2021. Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_pixel_release_40k.py \
    --num-gpus 4
"""

from ..common.contrast.pixel import pixel_release as _pixel_release
from ..common.contrast.taps import stages as _stages
from ..common.contrast.taps import tap as _tap
from .deeplabv3_r101_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel_release, "res5", _stages)
model.contrast.max_anchors = 4096  # the release's 1,024 on each of four GPUs
train.output_dir = "output/cityscapes/deeplabv3_r101_pixel_release_40k"
