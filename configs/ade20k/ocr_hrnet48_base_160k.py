"""ADE20K, OCR on HRNetV2-W48, baseline: no number known. Four GPUs; as on Cityscapes, for the
paper does not state how many.

python train_net.py --config-file configs/ade20k/ocr_hrnet48_base_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]
"""

from ..common.data.ade20k import dataloader, dataset
from ..common.models.ocr import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

optimizer.lr = 0.02
optimizer.weight_decay = 1e-4
model.sem_seg_head.align_corners = True
train.max_iter = 160_000
train.eval_period = 8000
train.checkpointer.period = 8000
train.output_dir = "output/ade20k/ocr_hrnet48_base_160k"
