r"""Cityscapes, HRNetV2-W48, pixel contrast with a memory of correct pixels: no number known. Four
GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_pixel_memory_correct_40k.py \
    --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pixel_memory_paper` with a memory that admits rightly predicted pixels alone.
"""

from .fcn_hrnet48_pixel_memory_40k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast.memory.admission = "correct"
train.output_dir = "output/cityscapes/fcn_hrnet48_pixel_memory_correct_40k"
