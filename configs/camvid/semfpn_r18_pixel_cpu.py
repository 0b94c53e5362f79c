"""CamVid on a CPU: as its baseline, with pixel contrast within the batch.

python train_net.py --config-file configs/camvid/semfpn_r18_pixel_cpu.py
"""

from ..common.contrast.pixel import pixel as _contrast
from .semfpn_r18_base_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.warmup_iters = 188
train.output_dir = "output/camvid/semfpn_r18_pixel_cpu"
