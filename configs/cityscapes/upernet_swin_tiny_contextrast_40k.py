r"""Cityscapes, UPerNet on Swin-T, Contextrast: 79.26 mIoU with multi-scale testing (Tables VI and
VII of Sung et al., arXiv 2608.22679). Two GPUs; the paper does not state how many.

python train_net.py --config-file configs/cityscapes/upernet_swin_tiny_contextrast_40k.py \
    --num-gpus 2

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

Preset `contextrast`: temperature 0.1 and a share of 0.5 of the deepest mean are ours, for the paper
has none.
"""

from ..common.contrast.contextrast import contextrast as _contrast
from .upernet_swin_tiny_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/cityscapes/upernet_swin_tiny_contextrast_40k"
