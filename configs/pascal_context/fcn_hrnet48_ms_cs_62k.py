"""PASCAL-Context, HRNetV2-W48, multi- and cross-scale contrast: 55.3 mIoU with multi-scale testing
(Table 6 of Pissas et al., ECCV 2022). Four GPUs; as on Cityscapes, for the paper does not state how
many.

python train_net.py --config-file configs/pascal_context/fcn_hrnet48_ms_cs_62k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.long_side=520
dataloader.inference.short_side=null dataloader.inference.window=512 dataloader.inference.stride=341
dataloader.inference.flip=True dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class.
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .fcn_hrnet48_base_62k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/pascal_context/fcn_hrnet48_ms_cs_62k"
