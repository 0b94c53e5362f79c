"""Cityscapes, HRNetV2-W48, baseline with region mutual information: 79.9 mIoU (Wang et al., ICCV
2021, as cited in Table 1(b) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_rmi_40k.py --num-gpus 4

Pooled by the maximum of 3x3 pixels, as in the release of Wang et al., ICCV 2021; its own cross
entropy does not weigh the classes.
"""

from ..common.losses import rmi_max as _loss
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.seg_loss = _loss
train.output_dir = "output/cityscapes/fcn_hrnet48_base_rmi_40k"
