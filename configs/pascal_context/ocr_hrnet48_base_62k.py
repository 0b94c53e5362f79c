"""PASCAL-Context, OCR on HRNetV2-W48, baseline: 55.8 mIoU with multi-scale testing (Table 6 of
Pissas et al., ECCV 2022). Four GPUs; as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/pascal_context/ocr_hrnet48_base_62k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.long_side=520
dataloader.inference.short_side=null dataloader.inference.window=512 dataloader.inference.stride=341
dataloader.inference.flip=True dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]
"""

from ..common.models.ocr import model
from .fcn_hrnet48_base_62k import dataloader, dataset, lr_multiplier, optimizer, train

model.sem_seg_head.align_corners = True
train.output_dir = "output/pascal_context/ocr_hrnet48_base_62k"
