"""Cityscapes, DeepLabV3 on ResNet-101, positive-negative equal contrast on the map that is
classified: the one model of the release of Wang et al., Neurocomputing 2023. We know no number of
it. Four GPUs.

python train_net.py --config-file configs/cityscapes/deeplabv3_r101_pne_40k.py --num-gpus 4

That map has 512 channels in the release: `model.sem_seg_head.channels=512`.
"""

from ..common.contrast.pne import pne as _pne
from ..common.contrast.taps import decoded as _decoded
from ..common.contrast.taps import tap as _tap
from .deeplabv3_r101_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pne, "pre_logits", _decoded("pre_logits"))
train.output_dir = "output/cityscapes/deeplabv3_r101_pne_40k"
