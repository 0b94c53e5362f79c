"""ADE20K, UPerNet on Swin-T, multi- and cross-scale contrast on the decoder's pyramid: 60 million
parameters, 45.9 mIoU, 46.6 mIoU with multi-scale testing (Table 4(a) of Pissas et al., ECCV 2022).
Four GPUs; as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/ade20k/upernet_swin_tiny_ms_cs_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class.
"""

from ..common.contrast.ms_cs import ms_cs_pyramid as _contrast
from .upernet_swin_tiny_base_160k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/ade20k/upernet_swin_tiny_ms_cs_160k"
