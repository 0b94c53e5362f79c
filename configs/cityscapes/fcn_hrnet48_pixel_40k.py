"""Cityscapes, HRNetV2-W48, pixel contrast within the batch: 80.2 mIoU in the release of the
authors (Wang et al., ICCV 2021). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pixel_40k.py --num-gpus 4
"""

from ..common.contrast.pixel import pixel as _pixel
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel, "concat", _joined("concat"))
train.output_dir = "output/cityscapes/fcn_hrnet48_pixel_40k"
