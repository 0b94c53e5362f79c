"""Cityscapes, HRNetV2-W48, multi- and cross-scale contrast on its four branches: 81.4 mIoU (Table
1(a) of Pissas et al., ECCV 2022), with 9.7 GB on each of four GPUs and 81.5 in Table 7(a).

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_ms_cs_40k.py --num-gpus 4

Sung et al., arXiv 2608.22679, Table III, have 81.5 for it with multi-scale testing.
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # the paper's 10,000 on each of its four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_ms_cs_40k"
