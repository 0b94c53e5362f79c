r"""Cityscapes, DeepLabV3 on ResNet-101, pixel contrast within the batch as released on C5: 77.67
mIoU (README of the release of Wang et al., ICCV 2021). Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_pixel_release_40k.py \
    --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pixel_release`: the anchors and the factor of 1.43 of the official code. The stem of three
convolutions, 512 channels and the auxiliary head are mmsegmentation's, and alike in the release of
Wang et al., ICCV 2021.
"""

from ..common.contrast.pixel import pixel_release as _pixel_release
from ..common.contrast.taps import stages as _stages
from ..common.contrast.taps import tap as _tap
from .deeplabv3_r101_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel_release, "res5", _stages)
model.contrast.max_anchors = 4096  # 1,024 on each of four GPUs
train.output_dir = "output/cityscapes/deeplabv3_r101_pixel_release_40k"
