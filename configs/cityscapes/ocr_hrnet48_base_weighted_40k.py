"""Cityscapes, OCR on HRNetV2-W48, baseline with weights of classes: no number known. Four GPUs.

python train_net.py --config-file configs/cityscapes/ocr_hrnet48_base_weighted_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

The baseline of pixel contrast.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.models.ocr import model
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, optimizer, train

model.seg_loss.main.class_weights = _class_weights
model.sem_seg_head.align_corners = True
train.output_dir = "output/cityscapes/ocr_hrnet48_base_weighted_40k"
