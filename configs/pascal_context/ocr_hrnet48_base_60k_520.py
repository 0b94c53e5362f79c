"""PASCAL-Context, OCR on HRNetV2-W48, baseline: no number known. Four GPUs; its scripts name GPUs
0 to 3.

python train_net.py --config-file configs/pascal_context/ocr_hrnet48_base_60k_520.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]
"""

from ..common.models.ocr import model
from .fcn_hrnet48_base_60k_520 import dataloader, dataset, lr_multiplier, optimizer, train

model.sem_seg_head.align_corners = True
train.output_dir = "output/pascal_context/ocr_hrnet48_base_60k_520"
