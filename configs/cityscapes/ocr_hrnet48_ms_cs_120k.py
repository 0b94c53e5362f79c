"""Cityscapes, OCR on HRNetV2-W48, multi- and cross-scale contrast on the four branches: 81.9 mIoU
(Table 5(a) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/ocr_hrnet48_ms_cs_120k.py --num-gpus 4
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .ocr_hrnet48_base_120k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # the paper's 10,000 on each of its four GPUs
train.output_dir = "output/cityscapes/ocr_hrnet48_ms_cs_120k"
