"""ADE20K, OCR on HRNetV2-W48, multi- and cross-scale contrast with online hard example mining: no
number known. Four GPUs; as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/ade20k/ocr_hrnet48_ms_cs_ohem_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class. Threshold 0.9 and
131,072 pixels of a batch are those of HRNet's recipe, and the numbers of HRNet's repository,
trained on 520x520 crops and tested at scales of 0.5 to 2. The method with the loss of the baseline
that the paper cites.
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .ocr_hrnet48_base_ohem_160k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/ade20k/ocr_hrnet48_ms_cs_ohem_160k"
