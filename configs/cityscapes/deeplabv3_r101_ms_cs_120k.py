"""Cityscapes, DeepLabV3 on ResNet-101, multi- and cross-scale contrast on C2, C3 and C5: 79.0 mIoU
(Table 5(a) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_ms_cs_120k.py --num-gpus 4

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class.
"""

from ..common.contrast.ms_cs import ms_cs_dilated as _contrast
from .deeplabv3_r101_base_120k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/deeplabv3_r101_ms_cs_120k"
