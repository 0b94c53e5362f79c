"""What decoders are built of.

Convolutions before a norm start as He et al., ICCV 2015, propose, by the size of their output, and
classifiers with a deviation of 0.01 and without bias, so that all classes are about as likely at
first; detectron2's own parts start as detectron2 does.

Shape letters: B images, C channels, K classes, h w a feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F


class ConvHead(nn.Module):
    """Convolution - norm - ReLU - channel dropout - 1x1 convolution, as FCN heads are today.

    Args:
        in_channels: of the map to classify.
        hidden_channels: width between the two convolutions.
        num_classes: K.
        kernel_size: of the first convolution, odd.
        norm: norm of the first convolution, "" for none.
        dropout: rate of channel dropout before the last convolution.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        *,
        kernel_size: int = 3,
        norm: str = "BN",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = conv_norm_relu(in_channels, hidden_channels, kernel_size, norm=norm)
        self.dropout = channel_dropout(dropout)
        self.predictor = classifier(hidden_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Args: map (B, C, h, w). Returns logits (B, K, h, w)."""
        return self.predictor(self.dropout(self.conv(x)))


class AuxiliaryHead(nn.Module):
    """A `ConvHead` on one map of the backbone, in training only: no other output depends on it.

    Args:
        input_shape: channels and strides of the maps of the backbone.
        feature: name of the map to classify.
        hidden_channels, num_classes, norm, dropout: as for `ConvHead`.

    Raises:
        ValueError: there is no such map.

    Reference: Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, section 4.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        feature: str,
        hidden_channels: int,
        num_classes: int,
        *,
        norm: str = "BN",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.feature = feature
        self.head = ConvHead(
            shape_of(input_shape, "aux_feature", feature).channels,
            hidden_channels,
            num_classes,
            norm=norm,
            dropout=dropout,
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor | None:
        """Args: maps by name. Returns logits (B, K, h, w), and None in evaluation."""
        return self.head(features[self.feature]) if self.training else None


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, *, norm: str) -> Conv2d:
    """A convolution that keeps the size of the map, its norm, and ReLU.

    Raises:
        ValueError: an even kernel, an unknown norm, or one that does not fit the width.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: must be odd, to keep the size of the map.")
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=norm_layer(norm, out_channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(conv)
    return conv


def norm_layer(norm: str, channels: int) -> nn.Module | None:
    """detectron2's `get_norm`, with errors that say what to change."""
    try:
        return get_norm(norm, channels)
    except KeyError as error:
        raise ValueError(
            f'norm={norm!r}: detectron2 knows "BN", "SyncBN", "GN" and "FrozenBN"; "" is for none.'
        ) from error
    except ValueError as error:
        raise ValueError(
            f"norm={norm!r} does not fit {channels} channels ({error}): choose another norm, or "
            "another width."
        ) from error


def channel_dropout(rate: float) -> nn.Dropout2d:
    """Dropout of whole channels at a rate in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout={rate}: must lie in [0, 1).")
    return nn.Dropout2d(rate)


def classifier(in_channels: int, num_classes: int) -> nn.Conv2d:
    """The 1x1 convolution from features to class scores."""
    conv = nn.Conv2d(in_channels, num_classes, kernel_size=1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Resizes a map (B, C, h, w) bilinearly, in its own dtype.

    Without `align_corners` a pixel covers the same area of the image on all maps. Official code of
    convolutional networks often aligns the corners instead.
    """
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def join(maps: Sequence[Tensor], align_corners: bool = False) -> Tensor:
    """Concatenates maps (B, C_i, h_i, w_i) at the size of the first, (B, sum of C_i, h, w)."""
    first, *others = maps
    return torch.cat([first, *(resize(x, first.shape[-2:], align_corners) for x in others)], dim=1)


def finest_first(input_shape: Mapping[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    """The maps by increasing stride, and by name where strides are equal, as in dilated networks.

    Raises:
        ValueError: there is none.
    """
    if not input_shape:
        raise ValueError("input_shape={}: name at least one feature map.")
    return dict(sorted(input_shape.items(), key=lambda item: (item[1].stride, item[0])))


def shape_of(input_shape: Mapping[str, ShapeSpec], argument: str, feature: str) -> ShapeSpec:
    """Shape of the map that an argument names.

    Raises:
        ValueError: there is no such map.
    """
    if feature not in input_shape:
        raise ValueError(f"{argument}={feature!r}: the feature maps are {list(input_shape)}.")
    return input_shape[feature]
