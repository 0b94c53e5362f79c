r"""PASCAL-Context, OCR on HRNetV2-W48, multi- and cross-scale contrast as released: 56.5 mIoU with
multi-scale testing (Table 6 of Pissas et al., ECCV 2022). Four GPUs; as on Cityscapes, for the
paper does not state how many.

python train_net.py --config-file configs/pascal_context/ocr_hrnet48_ms_cs_release_62k.py \
    --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.long_side=520
dataloader.inference.short_side=null dataloader.inference.window=512 dataloader.inference.stride=341
dataloader.inference.flip=True dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `ms_cs_release`: anchors by image and class, at least 5 pixels, and the projector and mean of
the official code; model and schedule are those of the file without `release`.
"""

from ..common.contrast.ms_cs import released as _released
from .ocr_hrnet48_ms_cs_62k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _released(model.contrast)
train.output_dir = "output/pascal_context/ocr_hrnet48_ms_cs_release_62k"
