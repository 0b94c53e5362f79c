"""DeepLabV3 and DeepLabV3+: atrous spatial pyramid pooling of a dilated backbone's deepest map.

Shape letters: B images, C channels, K classes, h w a feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.config import configurable
from detectron2.layers import ASPP, DepthwiseSeparableConv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.projects.deeplab import DeepLabV3Head
from torch import Tensor, nn
from torch.nn import functional as F

from ..structures import SegOutput
from .head import Decoder
from .layers import (
    AuxiliaryHead,
    channel_dropout,
    classifier,
    conv_norm_relu,
    join,
    norm_layer,
    shape_of,
)

# By the stride of the map: Chen et al., 2017, section 3.3.
_DILATIONS = {8: (12, 24, 36), 16: (6, 12, 18)}


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabV3Decoder(Decoder):
    """detectron2's `ASPP` and a 1x1 convolution, at the stride of the map that they stand on.

    The image is pooled whole, whatever its size, and that branch has no norm, which on one image
    would have a single value per channel. The paper has a batch norm there, and states neither
    dropout nor an auxiliary head; torchvision has one more 3x3 convolution before the classifier.

    Args:
        input_shape: channels and strides of the maps of the backbone.
        num_classes: K.
        in_feature: the map to classify.
        dilations: of the three 3x3 convolutions; None for the paper's at the stride of the map,
            (12, 24, 36) at 8 and (6, 12, 18) at 16.
        channels: width of each branch and of what is classified.
        norm: norm of the convolutions, "" for none.
        dropout: rate of channel dropout before the last convolution and in the auxiliary head.
        aux_feature: map of an auxiliary head, `res4` in many trainings; None for no such head.
        aux_channels: width of the auxiliary head.
        align_corners: how scores are resized to the image, see `resize`.
        ignore_value: as for `Decoder`.

    Raises:
        ValueError: no such map, a stride without dilations, or not three of them.

    Reference: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017,
        section 3.3.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        in_feature: str = "res5",
        dilations: Sequence[int] | None = None,
        channels: int = 256,
        norm: str = "BN",
        dropout: float = 0.1,
        aux_feature: str | None = None,
        aux_channels: int = 256,
        align_corners: bool = False,
        ignore_value: int = 255,
    ) -> None:
        super().__init__(shape_of(input_shape, "in_feature", in_feature).stride, ignore_value)
        self.in_feature = in_feature
        self.align_corners = align_corners
        self.aspp = _aspp(input_shape, in_feature, dilations, channels, norm)
        self.dropout = channel_dropout(dropout)
        self.predictor = classifier(channels, num_classes)
        self.aux_head = None
        if aux_feature is not None:
            self.aux_head = AuxiliaryHead(
                input_shape, aux_feature, aux_channels, num_classes, norm=norm, dropout=dropout
            )

    def decode(self, features: Mapping[str, Tensor]) -> SegOutput:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w), in training those of the
        auxiliary head, and as feature `pre_logits` what is classified, before dropout."""
        pre_logits = self.aspp(features[self.in_feature])
        logits = self.predictor(self.dropout(pre_logits))
        aux_logits = None if self.aux_head is None else self.aux_head(features)
        return SegOutput(logits, aux_logits, {"pre_logits": pre_logits}, self.align_corners)


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabV3PlusDecoder(Decoder):
    """DeepLabV3 up to its classifier, refined with a shallow map at the stride of the latter.

    The shallow map is narrowed by a 1x1 convolution and joined with the pooled one; two 3x3
    convolutions follow.

    Args:
        input_shape: channels and strides of the maps of the backbone.
        num_classes: K.
        in_feature: the deep map.
        low_level_feature: the shallow map.
        dilations: as for `DeepLabV3Decoder`.
        channels: width of the pooling and of what is classified.
        low_level_channels: width that the shallow map is narrowed to.
        separable: the 3x3 convolutions of pooling and decoder are depthwise separable, as the paper
            has them with Xception.
        norm, dropout, aux_feature, aux_channels, ignore_value: as for `DeepLabV3Decoder`.

    Raises:
        ValueError: as `DeepLabV3Decoder`.

    Reference: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
        Segmentation", ECCV 2018, section 3.1.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        in_feature: str = "res5",
        low_level_feature: str = "res2",
        dilations: Sequence[int] | None = None,
        channels: int = 256,
        low_level_channels: int = 48,
        separable: bool = False,
        norm: str = "BN",
        dropout: float = 0.1,
        aux_feature: str | None = None,
        aux_channels: int = 256,
        ignore_value: int = 255,
    ) -> None:
        low_level = shape_of(input_shape, "low_level_feature", low_level_feature)
        super().__init__(low_level.stride, ignore_value)
        self.in_feature = in_feature
        self.low_level_feature = low_level_feature
        self.aspp = _aspp(input_shape, in_feature, dilations, channels, norm, separable)
        self.project = conv_norm_relu(low_level.channels, low_level_channels, 1, norm=norm)
        conv = _separable_conv if separable else conv_norm_relu
        self.fuse = nn.Sequential(
            conv(low_level_channels + channels, channels, 3, norm=norm),
            conv(channels, channels, 3, norm=norm),
        )
        self.dropout = channel_dropout(dropout)
        self.predictor = classifier(channels, num_classes)
        self.aux_head = None
        if aux_feature is not None:
            self.aux_head = AuxiliaryHead(
                input_shape, aux_feature, aux_channels, num_classes, norm=norm, dropout=dropout
            )

    def decode(self, features: Mapping[str, Tensor]) -> SegOutput:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w) at the stride of the shallow
        map, in training those of the auxiliary head, and as feature `pre_logits` what is
        classified, before dropout."""
        low_level = self.project(features[self.low_level_feature])
        pre_logits = self.fuse(join([low_level, self.aspp(features[self.in_feature])]))
        logits = self.predictor(self.dropout(pre_logits))
        aux_logits = None if self.aux_head is None else self.aux_head(features)
        return SegOutput(logits, aux_logits, features={"pre_logits": pre_logits})


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabV3HeadWithLayers(DeepLabV3Head):
    """detectron2's `DeepLabV3Head` with the `layers` that its other heads have: a head needs it to
    train with contrast."""

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w)."""
        return self.predictor(self.aspp(features[self.in_features[0]]))


def _aspp(
    input_shape: Mapping[str, ShapeSpec],
    feature: str,
    dilations: Sequence[int] | None,
    channels: int,
    norm: str,
    separable: bool = False,
) -> ASPP:
    shape = shape_of(input_shape, "in_feature", feature)
    if dilations is None:
        if shape.stride not in _DILATIONS:
            raise ValueError(
                f"in_feature={feature!r} has stride {shape.stride}, for which the paper has no "
                "dilations: set model.backbone.output_stride to 8 or 16, or give dilations."
            )
        dilations = _DILATIONS[shape.stride]
    if len(dilations) != 3 or min(dilations) < 1:
        raise ValueError(f"dilations={list(dilations)}: give three, each 1 or more.")
    norm_layer(norm, channels)  # says what is wrong with it
    return ASPP(
        shape.channels,
        channels,
        list(dilations),
        norm=norm,
        activation=F.relu,
        use_depthwise_separable_conv=separable,
    )


def _separable_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, norm: str
) -> DepthwiseSeparableConv2d:
    norm_layer(norm, in_channels)
    return DepthwiseSeparableConv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        norm1=norm,
        activation1=F.relu,
        norm2=norm,
        activation2=F.relu,
    )
