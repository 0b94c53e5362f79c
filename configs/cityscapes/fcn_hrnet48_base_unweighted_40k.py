"""Cityscapes, HRNetV2-W48, baseline without weights of classes: 78.48 mIoU with multi-scale
testing (Table III of Sung et al., arXiv 2608.22679). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_unweighted_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

That of Contextrast: no weights of classes, and a learning rate that ends at 1e-4, as in
mmsegmentation, of whose model zoo this number is too, with one scale.
"""

from ..common.optim import poly_to_minimum as lr_multiplier
from .fcn_hrnet48_base_40k import dataloader, dataset, model, optimizer, train

model.seg_loss.main.class_weights = None
model.sem_seg_head.align_corners = False
train.output_dir = "output/cityscapes/fcn_hrnet48_base_unweighted_40k"
