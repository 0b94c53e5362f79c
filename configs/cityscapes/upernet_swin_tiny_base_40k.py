"""Cityscapes, UPerNet on Swin-T, baseline: 77.75 mIoU with multi-scale testing (Tables VI and VII
of Sung et al., arXiv 2608.22679). Two GPUs; the paper does not state how many.

python train_net.py --config-file configs/cityscapes/upernet_swin_tiny_base_40k.py --num-gpus 2

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]
"""

from .upernet_swin_tiny_base_160k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.seg_loss.main.class_weights = None
dataloader.train.total_batch_size = 6
train.max_iter = 40_000
train.eval_period = 2000
train.checkpointer.period = 2000
train.output_dir = "output/cityscapes/upernet_swin_tiny_base_40k"
