"""Cityscapes, HRNetV2-W48, multi- and cross-scale contrast as released: 82.2 mIoU (Tables 2, 3(b),
5(a) and 7(b) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_ms_cs_release_120k.py --num-gpus 4

Preset `ms_cs_release`: anchors by image and class, at least 5 pixels, and the projector and mean of
the official code; model and schedule are those of the file without `release`.
"""

from ..common.contrast.ms_cs import released as _released
from .fcn_hrnet48_ms_cs_120k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _released(model.contrast)
train.output_dir = "output/cityscapes/fcn_hrnet48_ms_cs_release_120k"
