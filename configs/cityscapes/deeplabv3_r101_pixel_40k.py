"""Cityscapes, DeepLabV3 on ResNet-101, pixel contrast within the batch, on C5, with the anchors of
Wang et al., ICCV 2021. The release has 77.7 mIoU with anchors as in
deeplabv3_r101_pixel_release_40k.py; we know no number with these. Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_pixel_40k.py --num-gpus 4
"""

from ..common.contrast.pixel import pixel as _pixel
from ..common.contrast.taps import stages as _stages
from ..common.contrast.taps import tap as _tap
from .deeplabv3_r101_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel, "res5", _stages)
train.output_dir = "output/cityscapes/deeplabv3_r101_pixel_40k"
