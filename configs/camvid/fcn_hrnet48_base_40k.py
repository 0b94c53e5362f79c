"""CamVid, HRNetV2-W48, baseline: no number known. Four GPUs; no script is shipped.

python train_net.py --config-file configs/camvid/fcn_hrnet48_base_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Void is ignored; in the release it is a twelfth class.
"""

from ..common.data.camvid import dataloader, dataset
from ..common.models.fcn_hrnet import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

model.sem_seg_head.align_corners = True
train.max_iter = 40_000
train.eval_period = 1000
train.checkpointer.period = 1000
train.output_dir = "output/camvid/fcn_hrnet48_base_40k"
