"""Cityscapes, HRNetV2-W48, baseline with Lovasz-softmax: 80.3 mIoU (Wang et al., ICCV 2021, as
cited in Table 1(b) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_lovasz_40k.py --num-gpus 4

A cross entropy that weighs the classes stands beside it, as in the release of Wang et al., ICCV
2021; whether the number was trained so, no source states.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.losses import cross_entropy_lovasz as _loss
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.seg_loss = _loss
model.seg_loss.main.losses.cross_entropy.class_weights = _class_weights
train.output_dir = "output/cityscapes/fcn_hrnet48_base_lovasz_40k"
