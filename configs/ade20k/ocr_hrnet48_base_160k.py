"""ADE20K, OCR on HRNetV2-W48, baseline with cross entropy, for the file of the method beside it.
The number of Pissas et al., ECCV 2022 is that of ocr_hrnet48_base_ohem_160k.py; we know no number
of this one. Four GPUs, as for Cityscapes; for ADE20K the paper does not state how many.

python train_net.py --config-file configs/ade20k/ocr_hrnet48_base_160k.py --num-gpus 4

Batch 16, 512x512 crops, 160k iterations, learning rate 0.02; the weight decay is its release's.
"""

from ..common.data.ade20k import dataloader, dataset
from ..common.models.ocr import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

optimizer.lr = 0.02
optimizer.weight_decay = 1e-4
train.max_iter = 160_000
train.eval_period = 8000
train.checkpointer.period = 8000
train.output_dir = "output/ade20k/ocr_hrnet48_base_160k"
