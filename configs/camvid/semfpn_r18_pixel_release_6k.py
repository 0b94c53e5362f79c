"""CamVid, Semantic FPN on ResNet-18, pixel contrast as in the authors' release. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_pixel_release_6k.py

A warm-up of 750 iterations is the release's share, 5000 of 40k.
"""

from ..common.contrast.pixel import pixel_release as _contrast
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.warmup_iters = 750
train.output_dir = "output/camvid/semfpn_r18_pixel_release_6k"
