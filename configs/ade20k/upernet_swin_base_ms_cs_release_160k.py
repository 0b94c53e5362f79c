r"""ADE20K, UPerNet on Swin-B, multi- and cross-scale contrast as released on the decoder's pyramid:
121 million parameters, 51.3 mIoU, 52.2 mIoU with multi-scale testing (Tables 4(a) and 8 of Pissas
et al., ECCV 2022). Four GPUs; as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/ade20k/upernet_swin_base_ms_cs_release_160k.py \
    --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]

Preset `ms_cs_release`: anchors by image and class, at least 5 pixels, and the projector and mean of
the official code; model and schedule are those of the file without `release`. Pretrained on
ImageNet-22k.
"""

from ..common.contrast.ms_cs import released as _released
from .upernet_swin_base_ms_cs_160k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast = _released(model.contrast)
train.output_dir = "output/ade20k/upernet_swin_base_ms_cs_release_160k"
