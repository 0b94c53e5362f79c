r"""Cityscapes, HRNetV2-W48, multi- and cross-scale contrast with equal weights: 81.8 mIoU (Table
3(b) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_ms_cs_equal_weights_120k.py \
    --num-gpus 4

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class.
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .fcn_hrnet48_base_120k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.scale_weights = {"res2": 1.0, "res3": 1.0, "res4": 1.0, "res5": 1.0}
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_ms_cs_equal_weights_120k"
