r"""PASCAL-Context, HRNetV2-W48, pixel contrast with a memory of regions and pixels: 55.1 mIoU with
multi-scale testing (Wang et al., ICCV 2021, as cited in Table 6 of Pissas et al., ECCV 2022). Four
GPUs; its scripts name GPUs 0 to 3.

python train_net.py --config-file configs/pascal_context/fcn_hrnet48_pixel_memory_60k_520.py \
    --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pixel_memory_paper`: the paper's memory of as many regions as training images and ten times
as many pixels, semi-hard pairs and a weight of 1. docs/methods.md says when such pairs fail. A
temperature of 0.07 is the release's for this dataset; the paper has 0.1.
"""

from ..common.contrast.pixel import pixel_memory_paper as _pixel
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_60k_520 import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel, "concat", _joined("concat"))
model.contrast.max_anchors = 40_000  # 50 of each class on each of four GPUs
model.contrast.temperature = 0.07
model.contrast.memory.regions_per_class = 4998  # training images
model.contrast.memory.pixels_per_class = 49_980
train.output_dir = "output/pascal_context/fcn_hrnet48_pixel_memory_60k_520"
