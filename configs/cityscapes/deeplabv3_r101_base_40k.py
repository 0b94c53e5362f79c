"""Cityscapes, DeepLabV3 on ResNet-101, baseline: 77.12 mIoU with multi-scale testing (Sung et al.,
arXiv 2608.22679, Table III), and 72.75 with one scale in the release of Wang et al., ICCV 2021.
Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_base_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

The weights of the classes and the weight of 0.4 of the auxiliary head are that release's; Sung et
al. state neither. Both have a ResNet whose stem is three convolutions, and the release pools 512
channels wide.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.models.deeplabv3 import model
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, optimizer, train

model.seg_loss.main.class_weights = _class_weights
train.output_dir = "output/cityscapes/deeplabv3_r101_base_40k"
