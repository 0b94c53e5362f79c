"""Cityscapes, HRNetV2-W48, contrast at one scale: 80.0 ± 0.1 mIoU (Table 1(a) of Pissas et al.,
ECCV 2022); 80.2 mIoU, 7.4 GB on each GPU (Table 7(a)). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_one_scale_40k.py --num-gpus 4

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class. The paper does
not say which map its one scale is; the release's single projector takes the map that joins the four
branches, at stride 4.
"""

from ..common.contrast.ms_cs import one_scale as _contrast
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_one_scale_40k"
