"""Cityscapes, HRNetV2-W48, baseline with adaptive affinity: 78.7 mIoU (Wang et al., ICCV 2021, as
cited in Table 1(b) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_aaf_40k.py --num-gpus 4

With which settings this was trained, no source states; those here are of Ke et al., ECCV 2018,
whose factor falls to a tenth.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.losses import aaf as _loss
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.seg_loss = _loss
model.seg_loss.main.losses.cross_entropy.class_weights = _class_weights
train.output_dir = "output/cityscapes/fcn_hrnet48_base_aaf_40k"
