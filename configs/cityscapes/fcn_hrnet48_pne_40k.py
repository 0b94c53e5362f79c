"""Cityscapes, HRNetV2-W48, positive-negative equal contrast. The paper (Wang et al., Neurocomputing
2023) has this model; we know no number of it. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pne_40k.py --num-gpus 4
"""

from ..common.contrast.pne import pne as _pne
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pne, "pre_logits", _joined("pre_logits"))
train.output_dir = "output/cityscapes/fcn_hrnet48_pne_40k"
