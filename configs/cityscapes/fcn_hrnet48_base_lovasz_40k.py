"""Cityscapes, HRNetV2-W48, baseline with Lovasz-softmax as its loss: 80.3 mIoU (Table 1(b) of
Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_lovasz_40k.py --num-gpus 4

The paper does not state whether it has a cross entropy beside it; ours has none.
"""

from ..common.losses import lovasz as _loss
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.seg_loss = _loss
train.output_dir = "output/cityscapes/fcn_hrnet48_base_lovasz_40k"
