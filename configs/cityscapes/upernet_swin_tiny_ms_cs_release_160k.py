r"""Cityscapes, UPerNet on Swin-T, multi- and cross-scale contrast as released: 79.9 mIoU (Table
5(a) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/upernet_swin_tiny_ms_cs_release_160k.py \
    --num-gpus 4

Preset `ms_cs_release`: anchors by image and class, at least 5 pixels, and the projector and mean of
the official code; model and schedule are those of the file without `release`.
"""

from ..common.contrast.ms_cs import released as _released
from .upernet_swin_tiny_ms_cs_160k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _released(model.contrast)
train.output_dir = "output/cityscapes/upernet_swin_tiny_ms_cs_release_160k"
