"""PASCAL-Context, 59 classes, DeepLabV3 on ResNet-101, multi- and cross-scale contrast on the
stages 2, 3 and 5: 52.27 mIoU with multi-scale testing (Sung et al., arXiv 2608.22679, Table III).
The paper does not state how many GPUs; ours: four.

python train_net.py --config-file configs/pascal_context/deeplabv3_r101_ms_cs_60k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]
"""

from ..common.contrast.ms_cs import ms_cs_dilated as _contrast
from .deeplabv3_r101_base_60k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/pascal_context/deeplabv3_r101_ms_cs_60k"
