"""Cityscapes, HRNetV2-W48, contrast at one scale: 80.0 mIoU (Table 1(a) of Pissas et al., ECCV
2022), with 7.4 GB on each of four GPUs and 80.2 in Table 7(a).

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_one_scale_40k.py --num-gpus 4

We do not know at which scale the paper has it; ours: the finest, of stride 4.
"""

from ..common.contrast.ms_cs import ms as _contrast
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.scale_weights = {"res2": 1.0}
model.contrast.max_anchors = 40_000  # the paper's 10,000 on each of its four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_one_scale_40k"
