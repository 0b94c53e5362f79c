"""CaDIS, task 2, OCR on ResNet-50, baseline: 82.36 mIoU on the validation videos, 90.63 of
anatomies, 76.89 of tools, 77.52 of rare classes (Table 4(b) of Pissas et al., ECCV 2022); 79.40
mIoU (Test videos of CaDIS of Pissas et al., MICCAI 2021). Four GPUs; the paper does not state how
many.

python train_net.py --config-file configs/cadis/ocr_r50_base_task2_50ep.py --num-gpus 4
"""

from ..common.data.cadis import dataloader, dataset
from ..common.losses import lovasz as _lovasz
from ..common.models.ocr import ocr_resnet as model
from ..common.optim import adam as optimizer
from ..common.optim import two_percent_less as lr_multiplier
from ..common.train import train

dataloader.train.repeat_threshold = 0.15
model.seg_loss = _lovasz
model.pixel_mean = [0.0, 0.0, 0.0]
model.pixel_std = [255.0, 255.0, 255.0]
model.sem_seg_head.align_corners = True
train.max_iter = 26_000
train.eval_period = 1040
train.checkpointer.period = 1040
train.output_dir = "output/cadis/ocr_r50_base_task2_50ep"
