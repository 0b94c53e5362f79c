"""CamVid on a CPU: as its baseline, with pixel contrast with a memory bank.

python train_net.py --config-file configs/camvid/semfpn_r18_pixel_memory_cpu.py
"""

from ..common.contrast.pixel import pixel_memory as _contrast
from .semfpn_r18_base_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.warmup_iters = 188
model.contrast.memory.regions_per_class = 367  # training images
model.contrast.memory.pixels_per_class = 3670
model.contrast.memory.max_keys = 2200
train.output_dir = "output/camvid/semfpn_r18_pixel_memory_cpu"
