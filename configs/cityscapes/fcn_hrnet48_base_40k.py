"""Cityscapes, HRNetV2-W48, baseline: 79.1 mIoU (Table 1(a) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_40k.py --num-gpus 4

Batch 8, 512x1024 crops, 40k iterations, learning rate 0.01 and the weights of the classes are the
short schedule of that paper. Other papers have the same, and other results: 79.3 in the release of
Wang et al., ICCV 2021, whose head is the one with `model.sem_seg_head.kernel_size=3
model.sem_seg_head.dropout=0.1`, and 78.5 with multi-scale testing in Sung et al., arXiv 2608.22679,
Table III, who state no weights of classes.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.data.cityscapes import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

model.seg_loss.main.class_weights = _class_weights
train.max_iter = 40_000
train.eval_period = 2000
train.checkpointer.period = 2000
train.output_dir = "output/cityscapes/fcn_hrnet48_base_40k"
