"""The fully convolutional head of HRNetV2.

Shape letters: B images, C channels, K classes, h w the finest feature map.
"""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor

from ..structures import SegOutput
from .head import Decoder
from .layers import channel_dropout, classifier, conv_norm_relu, finest_first, join


@SEM_SEG_HEADS_REGISTRY.register()
class FCNDecoder(Decoder):
    """Joins all maps at the finest one's size, then convolution - norm - ReLU - 1x1 convolution.

    Args:
        input_shape: channels and strides of the maps to use.
        num_classes: K.
        hidden_channels: width between the two convolutions; None for that of the joined map, as in
            the paper.
        kernel_size: of the first convolution; 1 as in the paper. Wang et al., ICCV 2021, train
            pixel contrast with 3 and a dropout of 0.1.
        norm: norm of the first convolution.
        dropout: rate of channel dropout before the last convolution.
        align_corners: how maps are joined and scores resized to the image, see `resize`.
        ignore_value: as for `Decoder`.

    Raises:
        ValueError: no map, an even kernel, or a rate outside of [0, 1).

    Reference: Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition",
        TPAMI 2020, section 3.3 (HRNetV2).
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        hidden_channels: int | None = None,
        kernel_size: int = 1,
        norm: str = "BN",
        dropout: float = 0.0,
        align_corners: bool = False,
        ignore_value: int = 255,
    ) -> None:
        shapes = finest_first(input_shape)
        super().__init__(min(s.stride for s in shapes.values()), ignore_value)
        self.in_features = list(shapes)
        self.align_corners = align_corners
        joined = sum(shape.channels for shape in shapes.values())
        hidden = joined if hidden_channels is None else hidden_channels
        self.fuse = conv_norm_relu(joined, hidden, kernel_size, norm=norm)
        self.dropout = channel_dropout(dropout)
        self.predictor = classifier(hidden, num_classes)

    def decode(self, features: Mapping[str, Tensor]) -> SegOutput:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w); the joined map as feature
        `concat`, and what is classified, before dropout, as `pre_logits`."""
        joined = join([features[name] for name in self.in_features], self.align_corners)
        pre_logits = self.fuse(joined)
        logits = self.predictor(self.dropout(pre_logits))
        features = {"concat": joined, "pre_logits": pre_logits}
        return SegOutput(logits, None, features, self.align_corners)
