"""Cityscapes, HRNetV2-W48, pixel contrast with a memory of pixels and regions: 81.0 mIoU (Wang et
al., ICCV 2021, in Table 2 of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pixel_memory_40k.py --num-gpus 4
"""

from ..common.contrast.pixel import pixel_memory as _pixel_memory
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel_memory, "concat", _joined("concat"))
train.output_dir = "output/cityscapes/fcn_hrnet48_pixel_memory_40k"
