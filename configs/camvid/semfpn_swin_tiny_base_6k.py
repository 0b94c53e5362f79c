"""CamVid, Semantic FPN on Swin-T, baseline. One GPU.

python train_net.py --config-file configs/camvid/semfpn_swin_tiny_base_6k.py
"""

from ..common.optim import adamw as optimizer
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, train

model.backbone.name = "swin_tiny_patch4_window7_224"
model.backbone.norm_outputs = True
model.backbone.drop_path_rate = 0.3
lr_multiplier.power = 1.0
lr_multiplier.warmup_iters = 500
train.output_dir = "output/camvid/semfpn_swin_tiny_base_6k"
