"""Cityscapes, HRNetV2-W48, baseline: a number that our copy of Table 7(b) of Pissas et al., ECCV
2022 does not show. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_80k.py --num-gpus 4
"""

from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

train.max_iter = 80_000
train.eval_period = 4000
train.checkpointer.period = 4000
train.output_dir = "output/cityscapes/fcn_hrnet48_base_80k"
