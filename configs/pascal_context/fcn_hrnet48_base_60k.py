"""PASCAL-Context, HRNetV2-W48, baseline: 51.96 mIoU with multi-scale testing (Table III of Sung et
al., arXiv 2608.22679). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/pascal_context/fcn_hrnet48_base_60k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]
"""

from ..common.data.pascal_context import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import poly_to_minimum as lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

train.max_iter = 60_000
train.eval_period = 3000
train.checkpointer.period = 3000
train.output_dir = "output/pascal_context/fcn_hrnet48_base_60k"
