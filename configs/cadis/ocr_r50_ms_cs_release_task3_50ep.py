"""CaDIS, task 3, OCR on ResNet-50, multi- and cross-scale contrast as released on C2 and C5: 78.25
mIoU on the validation videos, 90.76 of anatomies, 73.11 of tools, 72.67 of rare classes (Table 4(b)
of Pissas et al., ECCV 2022). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/cadis/ocr_r50_ms_cs_release_task3_50ep.py --num-gpus 4

Preset `ms_cs_release`: anchors by image and class, at least 5 pixels, and the projector and mean of
the official code; model and schedule are those of the file without `release`.
"""

from ..common.contrast.ms_cs import ms_cs_two_maps_release as _contrast
from .ocr_r50_base_task3_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cadis/ocr_r50_ms_cs_release_task3_50ep"
