"""Cityscapes, HRNetV2-W48, positive-negative equal contrast: no number known. Four GPUs; the paper
does not state how many.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pne_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pne`: the release's values, with random draws and a gate that is a share of the map. The
paper has this model; its release does not.
"""

from ..common.contrast.pne import pne as _pne
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_unweighted_40k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _tap(_pne, "pre_logits", _joined("pre_logits"))
train.output_dir = "output/cityscapes/fcn_hrnet48_pne_40k"
