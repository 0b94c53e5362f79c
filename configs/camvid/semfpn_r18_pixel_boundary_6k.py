"""CamVid, Semantic FPN on ResNet-18, pixel contrast with boundary-aware negatives. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_pixel_boundary_6k.py
"""

from ..common.contrast.boundary import boundary_negatives as _negatives
from .semfpn_r18_pixel_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast.negatives = _negatives
train.output_dir = "output/camvid/semfpn_r18_pixel_boundary_6k"
