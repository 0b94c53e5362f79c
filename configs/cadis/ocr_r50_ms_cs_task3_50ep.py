"""CaDIS, task 3, OCR on ResNet-50, multi- and cross-scale contrast on C2, C3 and C5: 78.25 mIoU on
the validation videos, 90.76 of anatomies, 73.11 of tools, 72.67 of rare classes (Table 4(b) of
Pissas et al., ECCV 2022). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/cadis/ocr_r50_ms_cs_task3_50ep.py --num-gpus 4

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class.
"""

from ..common.contrast.ms_cs import ms_cs_dilated as _contrast
from .ocr_r50_base_task3_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cadis/ocr_r50_ms_cs_task3_50ep"
