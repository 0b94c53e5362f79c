"""Cityscapes, HRNetV2-W48, baseline with adaptive affinity beside the cross entropy as its loss:
78.7 mIoU (Table 1(b) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_aaf_40k.py --num-gpus 4

The paper does not state with which settings it trained this loss; ours are those of
configs/common/losses.py.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.losses import aaf as _loss
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.seg_loss = _loss
model.seg_loss.main.losses.cross_entropy.class_weights = _class_weights
train.output_dir = "output/cityscapes/fcn_hrnet48_base_aaf_40k"
