"""The generated shapes dataset with positive-negative equal contrast. 2 CPU cores.

python train_net.py --config-file configs/shapes/semfpn_r18_pne_demo.py
"""

from ..common.contrast.pne import pne as _contrast
from .semfpn_r18_base_demo import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/shapes/semfpn_r18_pne_demo"
