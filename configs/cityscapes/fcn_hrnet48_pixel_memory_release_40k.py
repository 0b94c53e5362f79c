r"""Cityscapes, HRNetV2-W48, pixel contrast with a memory as released: no number known. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pixel_memory_release_40k.py \
    --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pixel_memory_release`: one rightly predicted anchor of each image and class, and 5,000 +
5,000 keys of each class, as in the official code; its faults, which docs/methods.md lists, are left
out.
"""

from ..common.contrast.pixel import pixel_memory_release as _pixel
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel, "concat", _joined("concat"))
model.contrast.max_anchors = 4096  # 1,024 on each of four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_pixel_memory_release_40k"
