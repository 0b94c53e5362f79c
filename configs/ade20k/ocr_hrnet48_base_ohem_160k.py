"""ADE20K, OCR on HRNetV2-W48, baseline with online hard example mining: 71 million parameters,
44.5 mIoU, 45.5 mIoU with multi-scale testing (Yuan et al., ECCV 2020, as cited in Table 4(a) of
Pissas et al., ECCV 2022). Four GPUs; as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/ade20k/ocr_hrnet48_base_ohem_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]

Threshold 0.9 and 131,072 pixels of a batch are those of HRNet's recipe, and the numbers of HRNet's
repository, trained on 520x520 crops and tested at scales of 0.5 to 2.
"""

from ..common.losses import ohem as _loss
from .ocr_hrnet48_base_160k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.seg_loss = _loss
train.output_dir = "output/ade20k/ocr_hrnet48_base_ohem_160k"
