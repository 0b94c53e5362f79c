"""Cityscapes, OCR on HRNetV2-W48, pixel contrast within the batch, on the four branches joined. The
release of Wang et al., ICCV 2021, has this model; we know no number of it. Four GPUs.

python train_net.py --config-file configs/cityscapes/ocr_hrnet48_pixel_40k.py --num-gpus 4
"""

from ..common.contrast.pixel import pixel as _pixel
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .ocr_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel, "concat", _joined("concat"))
train.output_dir = "output/cityscapes/ocr_hrnet48_pixel_40k"
