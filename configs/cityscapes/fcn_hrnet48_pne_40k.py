"""Cityscapes, HRNetV2-W48, positive-negative equal contrast. The paper (Wang et al., Neurocomputing
2023) has this model; we know no number of it. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pne_40k.py --num-gpus 4
"""

from detectron2.config import LazyCall as _L

from contrast_d2.backbones import joined_channels as _joined_channels

from ..common.contrast.pne import pne as _contrast
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
model.contrast.projector.in_channels = _L(_joined_channels)(
    name="${model.backbone.name}",
    feature="pre_logits",
    output_stride="${model.backbone.output_stride}",
)
train.output_dir = "output/cityscapes/fcn_hrnet48_pne_40k"
