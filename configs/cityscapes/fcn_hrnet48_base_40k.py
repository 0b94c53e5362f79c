"""Cityscapes, HRNetV2-W48, baseline: 79.1 mIoU in Pissas et al., ECCV 2022. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_40k.py --num-gpus 4

Batch 8, 512x1024 crops, 40k iterations and learning rate 0.01 are the short schedule of that paper.
Its loss weighs the classes; ours does not yet.
"""

from ..common.data.cityscapes import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

train.max_iter = 40_000
train.eval_period = 2000
train.checkpoint_period = 2000
train.output_dir = "output/cityscapes/fcn_hrnet48_base_40k"
