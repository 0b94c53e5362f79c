r"""Cityscapes, DeepLabV3 on ResNet-101, multi- and cross-scale contrast as released on C2, C4 and
C5: 79.0 mIoU (Table 5(a) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_ms_cs_release_120k.py \
    --num-gpus 4

Preset `ms_cs_release`: anchors by image and class, at least 5 pixels, and the projector and mean of
the official code; model and schedule are those of the file without `release`.
"""

from ..common.contrast.ms_cs import ms_cs_dilated_release as _contrast
from .deeplabv3_r101_base_120k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/deeplabv3_r101_ms_cs_release_120k"
