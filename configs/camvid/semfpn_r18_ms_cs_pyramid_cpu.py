"""CamVid on a CPU: as its baseline, with multi- and cross-scale contrast on the decoder's pyramid.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_pyramid_cpu.py
"""

from ..common.contrast.ms_cs import ms_cs_pyramid as _contrast
from .semfpn_r18_base_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.channels = dict.fromkeys(
    ("p2", "p3", "p4", "p5"), "${model.sem_seg_head.fpn_channels}"
)
train.output_dir = "output/camvid/semfpn_r18_ms_cs_pyramid_cpu"
