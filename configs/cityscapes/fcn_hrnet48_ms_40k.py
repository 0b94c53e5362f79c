"""Cityscapes, HRNetV2-W48, multi-scale contrast: 80.7 ± 0.2 mIoU (Table 1(a) of Pissas et al.,
ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_ms_40k.py --num-gpus 4

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class.
"""

from ..common.contrast.ms_cs import ms as _contrast
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_ms_40k"
