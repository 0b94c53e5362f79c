"""Cityscapes, OCR on HRNetV2-W48, baseline: 79.95 mIoU with multi-scale testing (Sung et al., arXiv
2608.22679, Table III). The paper does not state how many GPUs; ours: four.

python train_net.py --config-file configs/cityscapes/ocr_hrnet48_base_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

The schedule is that of the paper; it states no weights of classes, ours are those of HRNet.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.models.ocr import model
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, optimizer, train

model.seg_loss.main.class_weights = _class_weights
train.output_dir = "output/cityscapes/ocr_hrnet48_base_40k"
