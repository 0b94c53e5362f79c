"""ADE20K, HRNetV2-W48, baseline: 41.52 mIoU with multi-scale testing (Sung et al., arXiv
2608.22679, Table III). The paper does not state how many GPUs; ours: four.

python train_net.py --config-file configs/ade20k/fcn_hrnet48_base_80k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

Batch 12, 512x512 crops, 80k iterations, learning rate 0.01, weight decay 5e-4. The ranges of its
augmentations the paper does not state; ours are those of Pissas et al., ECCV 2022.
"""

from ..common.data.ade20k import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

dataloader.train.total_batch_size = 12
train.max_iter = 80_000
train.eval_period = 4000
train.checkpointer.period = 4000
train.output_dir = "output/ade20k/fcn_hrnet48_base_80k"
