"""The smallest network that has maps at several strides, an auxiliary head and contrast."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from contrast_d2.contrast import BalancedSampler, MultiScaleContrast, MultiScaleProjector
from contrast_d2.decoders import UPerNetDecoder
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.segmentor import ContrastiveSegmentor

# Overrides that put a small network under the contrast of an experiment with Semantic FPN.
SMALL_NETWORK = [
    "model.backbone.name=test_resnet",
    "model.sem_seg_head.fpn_channels=8",
    "model.sem_seg_head.conv_dims=32",
]

NUM_CLASSES = 5
CHANNELS = {"res2": 8, "res3": 12}
STRIDES = {"res2": 4, "res3": 8}


class TinyBackbone(Backbone):
    """Two convolutions: maps at strides 4 and 8."""

    size_divisibility = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.stage = nn.Conv2d(8, 12, kernel_size=2, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.stem(images).relu()
        return {"res2": fine, "res3": self.stage(fine).relu()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=CHANNELS[name], stride=STRIDES[name]) for name in STRIDES}


def tiny_contrast(embed_dim: int = 8) -> MultiScaleContrast:
    """Multi-scale contrast of both maps."""
    projector = MultiScaleProjector(CHANNELS, embed_dim, num_hidden=1)
    sampler = BalancedSampler(NUM_CLASSES, max_anchors=100)
    return MultiScaleContrast(projector, sampler, scale_weights=dict.fromkeys(CHANNELS, 1.0))


def tiny_segmentor(
    contrast: nn.Module | None = None, decoder: type[nn.Module] = UPerNetDecoder, **options: Any
) -> ContrastiveSegmentor:
    """A segmentor whose weights are the same for the same options.

    Args:
        contrast: its contrast method.
        decoder: class of the decoder.
        options: of the decoder.
    """
    torch.manual_seed(0)
    backbone = TinyBackbone()
    if decoder is UPerNetDecoder:
        options = {
            "channels": 6,
            "pool_sizes": (1, 2),
            "aux_feature": "res3",
            "aux_channels": 10,
            **options,
        }
    return ContrastiveSegmentor(
        backbone=backbone,
        sem_seg_head=decoder(backbone.output_shape(), num_classes=NUM_CLASSES, **options),
        pixel_mean=[120.0, 110.0, 100.0],
        pixel_std=[60.0, 50.0, 40.0],
        seg_loss=SegLoss(CrossEntropyLoss()),
        contrast=contrast,
    )
