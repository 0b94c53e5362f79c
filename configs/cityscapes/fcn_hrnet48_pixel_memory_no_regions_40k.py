r"""Cityscapes, HRNetV2-W48, pixel contrast with a memory of pixels: 80.5 mIoU (Wang et al., ICCV
2021, as cited in Table 2 of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pixel_memory_no_regions_40k.py \
    --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pixel_memory_paper`: the paper's memory of as many regions as training images and ten times
as many pixels, semi-hard pairs and a weight of 1. docs/methods.md says when such pairs fail.
"""

from ..common.contrast.pixel import pixel_memory_paper as _pixel_memory
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel_memory, "concat", _joined("concat"))
model.contrast.memory.regions_per_class = 0
train.output_dir = "output/cityscapes/fcn_hrnet48_pixel_memory_no_regions_40k"
