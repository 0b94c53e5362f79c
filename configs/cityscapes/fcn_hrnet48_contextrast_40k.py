"""Cityscapes, HRNetV2-W48, Contextrast on its four branches: 82.2 mIoU with multi-scale testing
(Sung et al., CVPR 2024). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_contextrast_40k.py --num-gpus 4
"""

from ..common.contrast.contextrast import contextrast as _contrast
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/cityscapes/fcn_hrnet48_contextrast_40k"
