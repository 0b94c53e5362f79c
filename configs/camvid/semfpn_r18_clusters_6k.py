"""CamVid, Semantic FPN on ResNet-18, clustered prototypes. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_clusters_6k.py
"""

from ..common.contrast.comparators import clusters as _contrast
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/semfpn_r18_clusters_6k"
