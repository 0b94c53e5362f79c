"""Object-contextual representations.

Shape letters: B images, C channels, D key channels, K classes, h w a feature map, N its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ..structures import SegOutput
from .head import Decoder
from .layers import (
    ConvHead,
    channel_dropout,
    classifier,
    conv_norm_relu,
    finest_first,
    join,
    resize,
    shape_of,
)


@SEM_SEG_HEADS_REGISTRY.register()
class OCRDecoder(Decoder):
    """Adds to each pixel what the object regions of the image, one per class, tell about it.

    An auxiliary head predicts the soft regions; a region's features are the mean of its pixels';
    each pixel attends to all regions. With the defaults this is the head on HRNetV2: all maps are
    joined, and the joined map predicts the regions through a 1x1 convolution of its own width. On a
    ResNet with output stride 8 it is `in_features=["res5"], region_feature="res4",
    region_channels=512, region_kernel_size=3`.

    Widths, the dropout and the scale of the attention, 1 / sqrt(D), are the authors' release's.

    Args:
        input_shape: channels and strides of the maps of the backbone.
        num_classes: K, also the number of regions.
        in_features: maps to join, None for all.
        channels: width of pixels and regions.
        key_channels: width of the attention.
        region_feature: map that predicts the regions; None for the joined one.
        region_channels: width of the head that does; None for that of its map.
        region_kernel_size: of its first convolution. Wang et al., ICCV 2021, have 3.
        norm: norm of all convolutions, "" for none.
        dropout: rate of channel dropout before the last convolution.
        align_corners: how maps are joined and scores resized to the image, see `resize`.
        ignore_value: as for `Decoder`.

    Raises:
        ValueError: no such map, an even kernel, or a rate outside of [0, 1).

    Reference: Yuan et al., "Object-Contextual Representations for Semantic Segmentation", ECCV
        2020, section 3.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        in_features: Sequence[str] | None = None,
        channels: int = 512,
        key_channels: int = 256,
        region_feature: str | None = None,
        region_channels: int | None = None,
        region_kernel_size: int = 1,
        norm: str = "BN",
        dropout: float = 0.05,
        align_corners: bool = False,
        ignore_value: int = 255,
    ) -> None:
        names = list(input_shape) if in_features is None else in_features
        shapes = finest_first({n: shape_of(input_shape, "in_features", n) for n in names})
        super().__init__(min(s.stride for s in shapes.values()), ignore_value)
        self.in_features = list(shapes)
        self.align_corners = align_corners
        joined = sum(shape.channels for shape in shapes.values())
        self.pixels = conv_norm_relu(joined, channels, 3, norm=norm)

        self.region_feature = region_feature
        width = joined
        if region_feature is not None:
            width = shape_of(input_shape, "region_feature", region_feature).channels
        self.region_head = ConvHead(
            width,
            width if region_channels is None else region_channels,
            num_classes,
            kernel_size=region_kernel_size,
            norm=norm,
        )
        self.attention = ObjectAttention(channels, key_channels, norm=norm)
        self.fuse = conv_norm_relu(2 * channels, channels, 1, norm=norm)
        self.dropout = channel_dropout(dropout)
        self.predictor = classifier(channels, num_classes)

    def decode(self, features: Mapping[str, Tensor]) -> SegOutput:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w) at the size of the finest
        map, and always those of the regions, as the auxiliary ones; as feature `concat` the joined
        maps, and as `pre_logits` what is classified, before dropout."""
        joined = join([features[name] for name in self.in_features], self.align_corners)
        source = joined if self.region_feature is None else features[self.region_feature]
        region_logits = self.region_head(source)

        pixels = self.pixels(joined)
        regions = object_regions(
            pixels, resize(region_logits, pixels.shape[-2:], self.align_corners)
        )
        context = self.attention(pixels, regions)
        pre_logits = self.fuse(torch.cat([context, pixels], dim=1))
        logits = self.predictor(self.dropout(pre_logits))
        features = {"concat": joined, "pre_logits": pre_logits}
        return SegOutput(logits, region_logits, features, self.align_corners)


def object_regions(pixels: Tensor, region_logits: Tensor) -> Tensor:
    """Features of each region: the mean of the pixels', weighted by a softmax over the pixels.

    Args:
        pixels: (B, C, h, w).
        region_logits: (B, K, h, w).

    Returns:
        (B, C, K, 1). Computed in fp32 or wider, since a share of a whole map is too small for fp16.
    """
    with _full_precision(pixels):
        shares_BKN = _widened(region_logits).flatten(2).softmax(dim=2)
        regions_BCK = _widened(pixels).flatten(2) @ shares_BKN.transpose(1, 2)
    return regions_BCK.to(pixels.dtype).unsqueeze(3)


class ObjectAttention(nn.Module):
    """For each pixel the regions' features, by their similarity to the pixel's.

    Args:
        channels: C.
        key_channels: D, of pixels and regions where they are compared.
        norm: norm of the 1x1 convolutions, "" for none.
    """

    def __init__(self, channels: int, key_channels: int, *, norm: str = "BN") -> None:
        super().__init__()
        widths = (channels, key_channels, key_channels)
        self.query = _convs(widths, norm)
        self.key = _convs(widths, norm)
        self.value = _convs(widths[:2], norm)
        self.output = _convs((key_channels, channels), norm)
        self.scale = key_channels**-0.5

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Args: pixels (B, C, h, w), regions (B, C, K, 1). Returns context (B, C, h, w)."""
        query, key, value = self.query(pixels), self.key(regions), self.value(regions)
        with _full_precision(pixels):
            query_BND = _widened(query).flatten(2).transpose(1, 2)
            key_BDK, value_BDK = _widened(key).flatten(2), _widened(value).flatten(2)
            weights_BNK = (query_BND @ (self.scale * key_BDK)).softmax(dim=2)
            context_BDN = value_BDK @ weights_BNK.transpose(1, 2)
        return self.output(context_BDN.to(query.dtype).unflatten(2, query.shape[-2:]))


def _convs(widths: Sequence[int], norm: str) -> nn.Sequential:
    return nn.Sequential(*(conv_norm_relu(a, b, 1, norm=norm) for a, b in pairwise(widths)))


def _full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast off; meta tensors, which have shapes alone, know none."""
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
