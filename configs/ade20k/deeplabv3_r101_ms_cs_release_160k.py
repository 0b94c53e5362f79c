"""ADE20K, DeepLabV3 on ResNet-101, multi- and cross-scale contrast as released on C2, C4 and C5:
63 million parameters, 44.2 mIoU, 45.6 mIoU with multi-scale testing (Table 8 of Pissas et al., ECCV
2022). Four GPUs; as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/ade20k/deeplabv3_r101_ms_cs_release_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]

Preset `ms_cs_release`: anchors by image and class, at least 5 pixels, and the projector and mean of
the official code; model and schedule are those of the file without `release`.
"""

from ..common.contrast.ms_cs import ms_cs_dilated_release as _contrast
from .deeplabv3_r101_base_160k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/ade20k/deeplabv3_r101_ms_cs_release_160k"
