r"""Cityscapes, HRNetV2-W48, multi- and cross-scale contrast as released, trained on both splits:
81.9 mIoU on the test set, 62.9 iIoU, 92.2 IoU of categories, 83.4 iIoU of categories (Table 5(b) of
Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_ms_cs_release_120k_trainval.py \
    --num-gpus 4

Preset `ms_cs_release`: anchors by image and class, at least 5 pixels, and the projector and mean of
the official code; model and schedule are those of the file without `release`. Trained on the 3,475
images of both splits, so that the evaluation during training, on one of them, says nothing; the
number is the test server's. The paper states no schedule of its own for this; ours is that of the
training split.
"""

from ..common.contrast.ms_cs import released as _released
from .fcn_hrnet48_ms_cs_120k_trainval import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _released(model.contrast)
train.output_dir = "output/cityscapes/fcn_hrnet48_ms_cs_release_120k_trainval"
