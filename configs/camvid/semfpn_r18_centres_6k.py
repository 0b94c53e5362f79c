"""CamVid, Semantic FPN on ResNet-18, centre regulariser. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_centres_6k.py
"""

from ..common.contrast.comparators import centres as _contrast
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/semfpn_r18_centres_6k"
