"""The fully convolutional head of HRNetV2.

Shape letters: B images, C channels, K classes, h w the finest feature map.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from ..structures import SegOutput


class FCNDecoder(nn.Module):
    """Joins all maps at the finest one's size, then 1x1 conv - norm - ReLU - 1x1 conv.

    Args:
        input_shape: channels and strides of the maps to use.
        num_classes: K.
        hidden_channels: width between the two convolutions; None for that of the joined map, as in
            the paper.
        norm: norm of the first convolution.
        dropout: rate of channel dropout before the last convolution.

    Reference: Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition",
        TPAMI 2020, section 3.3 (HRNetV2).
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        hidden_channels: int | None = None,
        norm: str = "BN",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not input_shape:
            raise ValueError("FCNDecoder(input_shape={}): name at least one feature map.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must lie in [0, 1).")
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in shapes]
        joined = sum(shape.channels for _, shape in shapes)
        hidden = joined if hidden_channels is None else hidden_channels
        self.fuse = Conv2d(
            joined,
            hidden,
            kernel_size=1,
            bias=not norm,
            norm=get_norm(norm, hidden),
            activation=F.relu,
        )
        self.dropout = nn.Dropout2d(dropout)
        self.predictor = nn.Conv2d(hidden, num_classes, kernel_size=1)

    def forward(self, features: Mapping[str, Tensor]) -> SegOutput:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w); the joined map as feature
        `concat`, and what is classified, before dropout, as `pre_logits`."""
        maps = [features[name] for name in self.in_features]
        size = maps[0].shape[-2:]
        joined = torch.cat(
            [maps[0]]
            + [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps[1:]],
            dim=1,
        )
        pre_logits = self.fuse(joined)
        logits = self.predictor(self.dropout(pre_logits))
        features = {"concat": joined, "pre_logits": pre_logits}
        return SegOutput(logits, aux_logits=None, features=features)
