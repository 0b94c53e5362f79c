"""ADE20K, HRNetV2-W48, baseline: 41.52 mIoU with multi-scale testing (Table III of Sung et al.,
arXiv 2608.22679). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/ade20k/fcn_hrnet48_base_80k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]
"""

from ..common.data.ade20k import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import poly_to_minimum as lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

dataloader.train.total_batch_size = 12
train.max_iter = 80_000
train.eval_period = 4000
train.checkpointer.period = 4000
train.output_dir = "output/ade20k/fcn_hrnet48_base_80k"
