"""The generated shapes dataset with multi- and cross-scale contrast: what `make demo` trains.

python train_net.py --config-file configs/shapes/semfpn_r18_ms_cs_demo.py
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .semfpn_r18_base_demo import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/shapes/semfpn_r18_ms_cs_demo"
