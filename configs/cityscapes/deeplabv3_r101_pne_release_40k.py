"""Cityscapes, DeepLabV3 on ResNet-101, positive-negative equal contrast as released: no number
known. Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_pne_release_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pne_release`: raster order, no gradient through an anchor's length, and a gate of 199
pixels. The stem of three convolutions, 512 channels and the auxiliary head are mmsegmentation's,
and alike in the release of Wang et al., ICCV 2021. The one model of the release; with the learning
rate that ends at 1e-4 of its baseline.
"""

from ..common.contrast.pne import pne_release as _pne
from ..common.contrast.taps import decoded as _decoded
from ..common.contrast.taps import tap as _tap
from .deeplabv3_r101_base_unweighted_40k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _tap(_pne, "pre_logits", _decoded("pre_logits"))
train.output_dir = "output/cityscapes/deeplabv3_r101_pne_release_40k"
