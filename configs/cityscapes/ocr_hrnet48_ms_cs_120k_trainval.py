"""Cityscapes, OCR on HRNetV2-W48, multi- and cross-scale contrast, trained on both splits: 82.4
mIoU on the test set, 63.6 iIoU, 92.2 IoU of categories, 83.7 iIoU of categories (Table 5(b) of
Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/ocr_hrnet48_ms_cs_120k_trainval.py --num-gpus 4

Preset `ms_cs`, ours: the paper's sampling with at least 32 anchors of each class. Trained on the
3,475 images of both splits, so that the evaluation during training, on one of them, says nothing;
the number is the test server's. The paper states no schedule of its own for this; ours is that of
the training split.
"""

from ..common.contrast.ms_cs import ms_cs as _contrast
from .ocr_hrnet48_base_120k_trainval import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _contrast
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/ocr_hrnet48_ms_cs_120k_trainval"
