"""CaDIS, task 2, OCR on ResNet-50, multi- and cross-scale contrast on stages 2 and 5: 82.56 mIoU on
the validation videos (Table 4(b) of Pissas et al., ECCV 2022). The paper does not state how many
GPUs; ours: four.

python train_net.py --config-file configs/cadis/ocr_r50_ms_cs_task2_50ep.py --num-gpus 4
"""

from ..common.contrast.ms_cs import ms_cs_two_maps as _contrast
from .ocr_r50_base_task2_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cadis/ocr_r50_ms_cs_task2_50ep"
