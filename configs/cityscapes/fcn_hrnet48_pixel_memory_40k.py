"""Cityscapes, HRNetV2-W48, pixel contrast with the memory bank: 81.0 mIoU (Wang et al., ICCV
2021). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pixel_memory_40k.py --num-gpus 4
"""

from detectron2.config import LazyCall as _L

from contrast_d2.backbones import joined_channels as _joined_channels

from ..common.contrast.pixel import pixel_memory as _contrast
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.projector.in_channels = _L(_joined_channels)(
    name="${model.backbone.name}",
    feature="concat",
    output_stride="${model.backbone.output_stride}",
)
model.contrast.feature = "concat"
train.output_dir = "output/cityscapes/fcn_hrnet48_pixel_memory_40k"
