"""Cityscapes, UPerNet on Swin-T, baseline: 79.2 mIoU (Table 5(a) of Pissas et al., ECCV 2022). Four
GPUs.

python train_net.py --config-file configs/cityscapes/upernet_swin_tiny_base_160k.py --num-gpus 4

The paper has AdamW, batch 8 and 160k iterations; learning rate, weight decay, warm-up and
stochastic depth are those of its release on ADE20K. It does not state whether there is an auxiliary
head; ours is that of Swin's own trainings.
"""

from ..common.data.cityscapes import dataloader, dataset
from ..common.models.upernet import model
from ..common.optim import adamw as optimizer
from ..common.optim import linear_after_warmup as lr_multiplier
from ..common.train import train

train.max_iter = 160_000
train.eval_period = 8000
train.checkpointer.period = 8000
train.output_dir = "output/cityscapes/upernet_swin_tiny_base_160k"
