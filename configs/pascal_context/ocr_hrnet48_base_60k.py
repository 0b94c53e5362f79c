"""PASCAL-Context, OCR on HRNetV2-W48, baseline: 53.25 mIoU with multi-scale testing (Table III of
Sung et al., arXiv 2608.22679). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/pascal_context/ocr_hrnet48_base_60k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]
"""

from ..common.models.ocr import model
from .fcn_hrnet48_base_60k import dataloader, dataset, lr_multiplier, optimizer, train

model.sem_seg_head.dropout = 0.0
train.output_dir = "output/pascal_context/ocr_hrnet48_base_60k"
