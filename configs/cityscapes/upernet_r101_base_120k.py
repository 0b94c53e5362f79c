"""Cityscapes, UPerNet on ResNet-101, baseline: 78.0 mIoU (Table 5(a) of Pissas et al., ECCV 2022).
Four GPUs.

python train_net.py --config-file configs/cityscapes/upernet_r101_base_120k.py --num-gpus 4
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.models.upernet import model
from .fcn_hrnet48_base_120k import dataloader, dataset, lr_multiplier, optimizer, train

model.backbone.name = "resnet101.tv_in1k"
model.backbone.norm_outputs = False
model.backbone.drop_path_rate = None
model.sem_seg_head.aux_feature = None
model.seg_loss.main.class_weights = _class_weights
train.output_dir = "output/cityscapes/upernet_r101_base_120k"
