"""COCO-Stuff 10k, DeepLabV3 on ResNet-101, baseline: 36.04 mIoU with multi-scale testing (Table
III of Sung et al., arXiv 2608.22679). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/coco_stuff/deeplabv3_r101_base_60k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

The stem of three convolutions, 512 channels and the auxiliary head are mmsegmentation's, and alike
in the release of Wang et al., ICCV 2021.
"""

from ..common.models.deeplabv3 import deep_stem as model
from .fcn_hrnet48_base_60k import dataloader, dataset, lr_multiplier, optimizer, train

train.output_dir = "output/coco_stuff/deeplabv3_r101_base_60k"
