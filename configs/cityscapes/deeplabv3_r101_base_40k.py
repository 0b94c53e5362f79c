"""Cityscapes, DeepLabV3 on ResNet-101, baseline: 72.75 mIoU (README of the release of Wang et al.,
ICCV 2021). Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_base_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

The stem of three convolutions, 512 channels and the auxiliary head are mmsegmentation's, and alike
in the release of Wang et al., ICCV 2021. The README says that this baseline does not reach what it
should.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.models.deeplabv3 import deep_stem as model
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, optimizer, train

model.seg_loss.main.class_weights = _class_weights
model.sem_seg_head.align_corners = True
train.output_dir = "output/cityscapes/deeplabv3_r101_base_40k"
