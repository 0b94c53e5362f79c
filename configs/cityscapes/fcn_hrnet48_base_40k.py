"""Cityscapes, HRNetV2-W48, baseline: 79.1 ± 0.2 mIoU (Table 1(a) of Pissas et al., ECCV 2022);
79.1 mIoU (Tables 1(b) and 7(b)); 79.27 mIoU (README of the release of Wang et al., ICCV 2021). Four
GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_40k.py --num-gpus 4

Batch, crop and iterations are stated by the paper; learning rate and weights of the classes are
those of its release. Wang et al., ICCV 2021, have the same schedule, and a head of 3x3 with a
dropout of 0.1: `model.sem_seg_head.kernel_size=3 model.sem_seg_head.dropout=0.1`.
"""

from ..common.class_weights import cityscapes as _class_weights
from ..common.data.cityscapes import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

model.sem_seg_head.align_corners = True
model.seg_loss.main.class_weights = _class_weights
train.max_iter = 40_000
train.eval_period = 2000
train.checkpointer.period = 2000
train.output_dir = "output/cityscapes/fcn_hrnet48_base_40k"
