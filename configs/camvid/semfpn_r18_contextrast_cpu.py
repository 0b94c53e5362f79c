"""CamVid on a CPU: as its baseline, with Contextrast on the stages of the backbone.

python train_net.py --config-file configs/camvid/semfpn_r18_contextrast_cpu.py
"""

from ..common.contrast.contextrast import contextrast as _contrast
from .semfpn_r18_base_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/semfpn_r18_contextrast_cpu"
