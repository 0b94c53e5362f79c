"""ADE20K, UPerNet on Swin-T, baseline: 60 million parameters, 44.7 mIoU, 45.5 mIoU with
multi-scale testing (Table 4(a) of Pissas et al., ECCV 2022). Four GPUs; as on Cityscapes, for the
paper does not state how many.

python train_net.py --config-file configs/ade20k/upernet_swin_tiny_base_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]
"""

from ..common.data.ade20k import dataloader, dataset
from ..common.inference import ade20k_short_side as _inference
from ..common.models.upernet import model
from ..common.optim import adamw as optimizer
from ..common.optim import linear_after_warmup as lr_multiplier
from ..common.train import train

dataloader.inference = _inference
train.max_iter = 160_000
train.eval_period = 8000
train.checkpointer.period = 8000
train.output_dir = "output/ade20k/upernet_swin_tiny_base_160k"
