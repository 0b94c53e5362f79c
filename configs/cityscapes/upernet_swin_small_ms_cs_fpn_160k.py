r"""Cityscapes, UPerNet on Swin-S, multi- and cross-scale contrast on the decoder's pyramid: 80.9
mIoU (Table 3(a) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/upernet_swin_small_ms_cs_fpn_160k.py \
    --num-gpus 4

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class.
"""

from ..common.contrast.ms_cs import ms_cs_pyramid as _contrast
from .upernet_swin_small_base_160k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/upernet_swin_small_ms_cs_fpn_160k"
