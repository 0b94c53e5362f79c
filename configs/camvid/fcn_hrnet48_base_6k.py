"""CamVid, HRNetV2-W48, baseline: 82.17 mIoU with multi-scale testing (Table III of Sung et al.,
arXiv 2608.22679). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/camvid/fcn_hrnet48_base_6k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

Whether the paper has these images of 480x360 or the 960x720 ones, it does not state.
"""

from ..common.data.camvid import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import poly_to_minimum as lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

lr_multiplier.min_factor = 0.005  # of that rate
optimizer.lr = 0.02
train.max_iter = 6000
train.output_dir = "output/camvid/fcn_hrnet48_base_6k"
