"""PASCAL-Context, OCR on HRNetV2-W48, pixel contrast within the batch: no number known. Four GPUs;
its scripts name GPUs 0 to 3.

python train_net.py --config-file configs/pascal_context/ocr_hrnet48_pixel_60k_520.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pixel`: the paper's anchors, with weight and warm-up of the release. A temperature of 0.07
is the release's for this dataset; the paper has 0.1.
"""

from ..common.contrast.pixel import pixel as _pixel
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .ocr_hrnet48_base_60k_520 import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel, "concat", _joined("concat"))
model.contrast.max_anchors = 40_000  # 50 of each class on each of four GPUs
model.contrast.temperature = 0.07
train.output_dir = "output/pascal_context/ocr_hrnet48_pixel_60k_520"
