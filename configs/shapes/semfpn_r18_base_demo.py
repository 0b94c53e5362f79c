"""The generated shapes dataset, Semantic FPN on ResNet-18 from scratch, baseline. 2 CPU cores.

python train_net.py --config-file configs/shapes/semfpn_r18_base_demo.py
"""

from ..common.data.shapes import dataloader, dataset
from ..common.models.semfpn import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

model.backbone.pretrained = False
optimizer.lr = 0.02
train.max_iter = 300
train.eval_period = 100
train.checkpoint_period = 100
train.output_dir = "output/shapes/semfpn_r18_base_demo"
