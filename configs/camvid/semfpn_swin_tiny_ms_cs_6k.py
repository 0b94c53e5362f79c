"""CamVid, Semantic FPN on Swin-T, multi- and cross-scale contrast on its stages. One GPU.

python train_net.py --config-file configs/camvid/semfpn_swin_tiny_ms_cs_6k.py
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .semfpn_swin_tiny_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/semfpn_swin_tiny_ms_cs_6k"
