r"""Cityscapes, HRNetV2-W48, multi- and cross-scale contrast without weights of classes: 81.50 mIoU
with multi-scale testing (Table III of Sung et al., arXiv 2608.22679). Four GPUs; the paper does not
state how many.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_ms_cs_unweighted_40k.py \
    --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

Preset `ms_cs` with one hidden block in the projector, of which Table XV of Sung et al. has the
parameters.
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .fcn_hrnet48_base_unweighted_40k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
model.contrast.num_hidden = 1
train.output_dir = "output/cityscapes/fcn_hrnet48_ms_cs_unweighted_40k"
