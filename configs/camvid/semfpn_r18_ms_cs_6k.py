"""CamVid, Semantic FPN on ResNet-18, multi- and cross-scale contrast, preset `ms_cs`: the
paper's sampling with our floor of 32 anchors of each class. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/semfpn_r18_ms_cs_6k"
