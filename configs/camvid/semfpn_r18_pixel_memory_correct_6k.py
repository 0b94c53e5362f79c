"""CamVid, Semantic FPN on ResNet-18, pixel contrast with a memory of rightly predicted pixels. One
GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_pixel_memory_correct_6k.py

A warm-up of 750 iterations is the release's share, 5000 of 40k.
"""

from .semfpn_r18_pixel_memory_6k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast.memory.admission = "correct"
train.output_dir = "output/camvid/semfpn_r18_pixel_memory_correct_6k"
