"""Cityscapes, OCR on HRNetV2-W48, pixel contrast within the batch: no number known. Four GPUs.

python train_net.py --config-file configs/cityscapes/ocr_hrnet48_pixel_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pixel`: the paper's anchors, with weight and warm-up of the release.
"""

from ..common.contrast.pixel import pixel as _pixel
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .ocr_hrnet48_base_weighted_40k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _tap(_pixel, "concat", _joined("concat"))
train.output_dir = "output/cityscapes/ocr_hrnet48_pixel_40k"
