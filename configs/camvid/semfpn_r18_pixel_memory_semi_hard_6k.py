"""CamVid, Semantic FPN on ResNet-18, pixel contrast with a memory bank and semi-hard
pairs as in the paper, with the weight of its official code. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_pixel_memory_semi_hard_6k.py

A warm-up of 750 iterations is the release's share, 5000 of 40k.
"""

from ..common.contrast.pixel import pixel_memory_semi_hard as _contrast
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.warmup_iters = 750
model.contrast.memory.regions_per_class = 367  # training images
model.contrast.memory.pixels_per_class = 3670
train.output_dir = "output/camvid/semfpn_r18_pixel_memory_semi_hard_6k"
