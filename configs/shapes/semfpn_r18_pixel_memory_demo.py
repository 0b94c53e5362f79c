"""The generated shapes dataset with pixel contrast and its memory bank. 2 CPU cores.

python train_net.py --config-file configs/shapes/semfpn_r18_pixel_memory_demo.py
"""

from ..common.contrast.pixel import pixel_memory as _contrast
from .semfpn_r18_base_demo import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.warmup_iters = 60
model.contrast.memory.regions_per_class = 256  # training images
model.contrast.memory.pixels_per_class = 2560
model.contrast.memory.max_keys = 1800
train.output_dir = "output/shapes/semfpn_r18_pixel_memory_demo"
