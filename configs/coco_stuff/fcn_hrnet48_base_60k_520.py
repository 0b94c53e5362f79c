"""COCO-Stuff 10k, HRNetV2-W48, baseline: no number known. Four GPUs; its scripts name GPUs 0 to 3.

python train_net.py --config-file configs/coco_stuff/fcn_hrnet48_base_60k_520.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]
"""

from ..common.data.coco_stuff import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd_fast_head as optimizer
from ..common.train import train

model.sem_seg_head.align_corners = True
train.max_iter = 60_000
train.eval_period = 3000
train.checkpointer.period = 3000
train.output_dir = "output/coco_stuff/fcn_hrnet48_base_60k_520"
