"""CamVid on a CPU: as its baseline, with multi- and cross-scale contrast.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_cpu.py
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .semfpn_r18_base_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/semfpn_r18_ms_cs_cpu"
