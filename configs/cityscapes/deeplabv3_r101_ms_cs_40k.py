"""Cityscapes, DeepLabV3 on ResNet-101, multi- and cross-scale contrast on C2, C3 and C5: 78.94 mIoU
with multi-scale testing (Sung et al., arXiv 2608.22679, Table III). Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_ms_cs_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]
"""

from ..common.contrast.ms_cs import ms_cs_dilated as _contrast
from .deeplabv3_r101_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # the paper's 10,000 on each of its four GPUs
train.output_dir = "output/cityscapes/deeplabv3_r101_ms_cs_40k"
