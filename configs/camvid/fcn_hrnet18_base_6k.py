"""CamVid, HRNetV2-W18, baseline. One GPU.

python train_net.py --config-file configs/camvid/fcn_hrnet18_base_6k.py
"""

from ..common.models.fcn_hrnet import model
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, optimizer, train

model.backbone.name = "hrnet_w18"
train.output_dir = "output/camvid/fcn_hrnet18_base_6k"
