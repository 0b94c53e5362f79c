"""ADE20K, DeepLabV3 on ResNet-101, baseline: 63 million parameters, 44.1 mIoU with multi-scale
testing (Zhang et al., ResNeSt, 2020, as cited in Table 8 of Pissas et al., ECCV 2022). Four GPUs;
as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/ade20k/deeplabv3_r101_base_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]

The number is of the supplement alone, from a paper with settings of its own. The learning rate is
the release's of OCR, for it has no config of this model.
"""

from ..common.models.deeplabv3 import model
from .ocr_hrnet48_base_160k import dataloader, dataset, lr_multiplier, optimizer, train

model.sem_seg_head.aux_feature = None
model.sem_seg_head.dropout = 0.0
model.sem_seg_head.align_corners = True
train.output_dir = "output/ade20k/deeplabv3_r101_base_160k"
