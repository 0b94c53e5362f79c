"""Cityscapes, HRNetV2-W48, fixed prototypes: no number known. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_prototypes_40k.py --num-gpus 4

Fixed prototypes as anchors, of which we know the abstract of Ren et al., TCSVT 2024; all values are
ours.
"""

from ..common.contrast.comparators import prototypes as _prototypes
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_prototypes, "concat", _joined("concat"))
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_prototypes_40k"
