"""Cityscapes, HRNetV2-W48, baseline: 79.1 mIoU in Pissas et al., ECCV 2022. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_base_40k.py --num-gpus 4

Batch 8, 512x1024 crops, 40k iterations, learning rate 0.01 and the weights of the classes are the
short schedule of that paper.
"""

from ..common.data.cityscapes import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

# In the order of the classes, from road to bicycle: rare ones weigh more.
model.seg_loss.main.class_weights = [
    *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
    *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
]
train.max_iter = 40_000
train.eval_period = 2000
train.checkpoint_period = 2000
train.output_dir = "output/cityscapes/fcn_hrnet48_base_40k"
