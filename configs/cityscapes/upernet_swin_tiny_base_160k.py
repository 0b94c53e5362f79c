"""Cityscapes, UPerNet on Swin-T, baseline: 79.2 mIoU (Table 5(a) of Pissas et al., ECCV 2022).
Four GPUs.

python train_net.py --config-file configs/cityscapes/upernet_swin_tiny_base_160k.py --num-gpus 4
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.data.cityscapes import dataloader, dataset
from ..common.models.upernet import model
from ..common.optim import adamw as optimizer
from ..common.optim import linear_after_warmup as lr_multiplier
from ..common.train import train

model.seg_loss.main.class_weights = _class_weights
train.max_iter = 160_000
train.eval_period = 8000
train.checkpointer.period = 8000
train.output_dir = "output/cityscapes/upernet_swin_tiny_base_160k"
