"""Cityscapes, DeepLabV3 on ResNet-101, baseline: 78.2 mIoU (Table 5(a) of Pissas et al., ECCV
2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_base_120k.py --num-gpus 4
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.models.deeplabv3 import model
from .fcn_hrnet48_base_120k import dataloader, dataset, lr_multiplier, optimizer, train

model.seg_loss.main.class_weights = _class_weights
model.sem_seg_head.aux_feature = None
model.sem_seg_head.dropout = 0.0
model.sem_seg_head.align_corners = True
train.output_dir = "output/cityscapes/deeplabv3_r101_base_120k"
