"""Semantic FPN: detectron2's feature pyramid and its semantic head, as a decoder.

Shape letters: B images, C channels, K classes, h w the finest feature map.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, SEM_SEG_HEADS_REGISTRY, Backbone
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import Tensor

from ..registries import arguments_of
from ..structures import SegOutput
from .head import chosen_maps

# What detectron2's `get_norm` knows.
# Of detectron2's group norm.
_GROUPS = 32
_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNDecoder(SemSegFPNHead):
    """detectron2's `SemSegFPNHead`, with the feature pyramid that it stands on.

    The pyramid belongs to the decoder, not to the backbone, so that the backbone's own maps
    (`res2`..) stay in reach of contrast methods; the pyramid's are `p2`...

    Args:
        input_shape: channels and strides of the maps to use.
        num_classes: K.
        fpn_channels: width of the pyramid built over the maps; None where they are a pyramid
            already, as with detectron2's `FPN` for a backbone.
        fpn_norm: norm of the pyramid's convolutions, "" for none.
        conv_dims: width of the head.
        norm: norm of the head's convolutions.
        common_stride: stride of the logits.
        loss_weight, ignore_value: of the loss in `forward`, which is for detectron2's
            `SemanticSegmentor`; `ContrastiveSegmentor` has losses of its own.

    Reference: Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, section 3.1.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        fpn_channels: int | None = 256,
        fpn_norm: str = "",
        conv_dims: int = 128,
        norm: str = "GN",
        common_stride: int = 4,
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ) -> None:
        for name, value in (("norm", norm), ("fpn_norm", fpn_norm)):
            if value not in _NORMS:
                raise ValueError(f"{name}={value!r}: choose one of {_NORMS}.")
        for name, channels, kind in (
            ("fpn_channels", fpn_channels, fpn_norm),
            ("conv_dims", conv_dims, norm),
        ):
            if channels is not None and kind == "GN" and channels % _GROUPS:
                raise ValueError(f"{name}={channels}: group norm needs a multiple of {_GROUPS}.")
        shapes = dict(sorted(input_shape.items(), key=lambda item: item[1].stride))
        fpn = None
        if fpn_channels is not None:
            _check_strides(shapes)
            fpn = FPN(_GivenFeatures(shapes), list(shapes), fpn_channels, norm=fpn_norm)
            shapes = fpn.output_shape()
        super().__init__(
            shapes,
            num_classes=num_classes,
            conv_dims=conv_dims,
            common_stride=common_stride,
            norm=norm,
            loss_weight=loss_weight,
            ignore_value=ignore_value,
        )
        self.fpn = fpn

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """As of detectron2's head; `fpn_channels` and `fpn_norm` are in
        MODEL.SEM_SEG_HEAD.OPTIONS."""
        given = super().from_config(cfg, chosen_maps(cfg, input_shape))
        options = cfg.MODEL.SEM_SEG_HEAD.OPTIONS
        return arguments_of(cls, options, "MODEL.SEM_SEG_HEAD.OPTIONS", **given)

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w)."""
        return self.decode(features).logits

    def decode(self, features: Mapping[str, Tensor]) -> SegOutput:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w); the pyramid's maps, and as
        feature `pre_logits` the map that is classified."""
        pyramid = {} if self.fpn is None else self.fpn(features)
        maps = pyramid or features
        heads = zip(self.in_features, self.scale_heads, strict=True)
        pre_logits = reduce(torch.add, (head(maps[name]) for name, head in heads))
        logits = self.predictor(pre_logits)
        return SegOutput(logits, aux_logits=None, features={**pyramid, "pre_logits": pre_logits})


class _GivenFeatures(Backbone):
    """Stands where `FPN` expects a backbone, and hands it maps that are computed already."""

    def __init__(self, shapes: dict[str, ShapeSpec]) -> None:
        super().__init__()
        self._shapes = shapes

    def forward(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


def _check_strides(shapes: Mapping[str, ShapeSpec]) -> None:
    strides = {name: shape.stride for name, shape in shapes.items()}
    if not strides or any(b != 2 * a for a, b in pairwise(strides.values())):
        raise ValueError(
            f"a feature pyramid needs maps whose strides double, got {strides}: leave the "
            "backbone's output_stride unset, or choose another decoder."
        )
