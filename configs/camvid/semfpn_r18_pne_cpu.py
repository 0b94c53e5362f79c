"""CamVid on a CPU: as its baseline, with positive-negative equal contrast.

python train_net.py --config-file configs/camvid/semfpn_r18_pne_cpu.py
"""

from ..common.contrast.pne import pne as _contrast
from .semfpn_r18_base_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/semfpn_r18_pne_cpu"
