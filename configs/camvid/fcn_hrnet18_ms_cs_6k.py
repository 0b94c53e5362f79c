"""CamVid, HRNetV2-W18, multi- and cross-scale contrast on its four branches. One GPU.

python train_net.py --config-file configs/camvid/fcn_hrnet18_ms_cs_6k.py
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .fcn_hrnet18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/fcn_hrnet18_ms_cs_6k"
