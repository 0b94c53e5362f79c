"""Cityscapes, UPerNet on Swin-S, baseline: 80.9 mIoU (Table 5(a) of Pissas et al., ECCV 2022).
Four GPUs.

python train_net.py --config-file configs/cityscapes/upernet_swin_small_base_160k.py --num-gpus 4
"""

from .upernet_swin_tiny_base_160k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.name = "swin_small_patch4_window7_224"
train.output_dir = "output/cityscapes/upernet_swin_small_base_160k"
