"""CamVid, Semantic FPN on ResNet-18, region contrast. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_region_6k.py
"""

from ..common.contrast.comparators import region as _contrast
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.memory.regions_per_class = 367  # training images
train.output_dir = "output/camvid/semfpn_r18_region_6k"
