"""The generated shapes dataset, Semantic FPN on ResNet-18 from scratch, baseline. 2 CPU cores.

python train_net.py --config-file configs/shapes/semfpn_r18_base_demo.py
"""

from ..common.data.shapes import dataloader, dataset
from ..common.models.semfpn import model
from ..common.optim import adamw as optimizer
from ..common.optim import lr_multiplier
from ..common.train import train

model.backbone.pretrained = False
model.sem_seg_head.fpn_channels = 64
model.sem_seg_head.conv_dims = 64
optimizer.lr = 2e-3
train.max_iter = 500
train.eval_period = 250
train.checkpointer.period = 250
train.output_dir = "output/shapes/semfpn_r18_base_demo"
