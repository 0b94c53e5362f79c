"""PASCAL-Context, HRNetV2-W48, baseline: 53.5 mIoU with multi-scale testing (Table 6 of Pissas et
al., ECCV 2022). Four GPUs; as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/pascal_context/fcn_hrnet48_base_62k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.long_side=520
dataloader.inference.short_side=null dataloader.inference.window=512 dataloader.inference.stride=341
dataloader.inference.flip=True dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Learning rate and weight decay are HRNet's; the paper's are not known to us. Several scales go with
the protocol `pascal_context_multi_scale` of configs/common/inference.py.
"""

from ..common.data.pascal_context import dataloader, dataset
from ..common.inference import pascal_context as _inference
from ..common.models.fcn_hrnet import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd_fast_head as optimizer
from ..common.train import train

dataloader.inference = _inference
model.sem_seg_head.align_corners = True
train.max_iter = 62_000
train.eval_period = 3100
train.checkpointer.period = 3100
train.output_dir = "output/pascal_context/fcn_hrnet48_base_62k"
