"""Cityscapes, HRNetV2-W48, baseline: 81.0 mIoU (Tables 5(a) and 7(b) of Pissas et al., ECCV 2022).
Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_120k.py --num-gpus 4
"""

from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

dataloader.train.total_batch_size = 12
train.max_iter = 120_000
train.eval_period = 5000
train.checkpointer.period = 5000
train.output_dir = "output/cityscapes/fcn_hrnet48_base_120k"
