"""CamVid, Semantic FPN on ResNet-18, multi- and cross-scale contrast as released, with labels of
maps by majority vote, which the official code offers. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_release_majority_6k.py
"""

from .semfpn_r18_ms_cs_release_6k import (
    dataloader,
    dataset,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.contrast.label_sampling = "majority"
train.output_dir = "output/camvid/semfpn_r18_ms_cs_release_majority_6k"
