"""Cityscapes, HRNetV2-W48, baseline with region mutual information as its loss: 79.9 mIoU (Table
1(b) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_rmi_40k.py --num-gpus 4

The cross entropy that the loss has of its own does not weigh the classes.
"""

from ..common.losses import rmi as _loss
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.seg_loss = _loss
train.output_dir = "output/cityscapes/fcn_hrnet48_base_rmi_40k"
