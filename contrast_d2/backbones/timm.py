"""Any timm model that yields feature maps, as a detectron2 backbone.

Shape letters: B images, C channels, H W the images, h w a feature map.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

_DEFAULT_FEATURES = ("res2", "res3", "res4", "res5")


class TimmBackbone(Backbone):
    """A timm model whose feature maps carry detectron2's names.

    The deepest map is `res5`, the ones before it `res4`, `res3` and so on, whatever their strides:
    strides 4, 8, 16, 32 by default; with `output_stride=8` ResNet's are 4, 8, 8, 8. For HRNet they
    are the four branches, before any fusion head.

    Args:
        name: timm's name of the model, e.g. "resnet18", "hrnet_w48",
            "swin_tiny_patch4_window7_224", optionally with a tag of its weights.
        out_features: names of the maps to return.
        output_stride: stride of the deepest map, by dilation; None for the model's own.
        pretrained: load timm's pretrained weights, downloaded on first use.
        norm_outputs: a LayerNorm on each returned map, as segmentation networks on Swin have.
        drop_path_rate: stochastic depth; None for the model's own.

    Raises:
        ValueError: timm has no such model or weights, or the model no such map, output stride or
            stochastic depth.
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = _DEFAULT_FEATURES,
        output_stride: int | None = None,
        pretrained: bool = False,
        norm_outputs: bool = False,
        drop_path_rate: float | None = None,
    ) -> None:
        super().__init__()
        shapes = feature_shapes(name, out_features=out_features, output_stride=output_stride)
        all_shapes = _all_shapes(name, output_stride)
        self.model = _create(
            name,
            output_stride,
            pretrained=pretrained,
            out_indices=tuple(list(all_shapes).index(feature) for feature in shapes),
            **({} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}),
        )
        self.norms = nn.ModuleDict()
        if norm_outputs:
            self.norms.update({name: nn.LayerNorm(s.channels) for name, s in shapes.items()})
        self._channels_last = _yields_channels_last(self.model)
        self._size_divisibility = max(shape.stride for shape in all_shapes.values())
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of this, so that all maps have exact strides."""
        return self._size_divisibility

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Args: images (B, 3, H, W). Returns maps (B, C, h, w) by name, from fine to coarse."""
        maps = dict(zip(self._out_features, self.model(images), strict=True))
        return {name: self._finish(name, x) for name, x in maps.items()}

    def _finish(self, name: str, x: Tensor) -> Tensor:
        if name in self.norms:
            x = x if self._channels_last else x.permute(0, 2, 3, 1)
            return self.norms[name](x).permute(0, 3, 1, 2).contiguous()
        return x.permute(0, 3, 1, 2).contiguous() if self._channels_last else x


def feature_shapes(
    name: str,
    *,
    out_features: Sequence[str] = _DEFAULT_FEATURES,
    output_stride: int | None = None,
) -> dict[str, ShapeSpec]:
    """Channels and strides of the maps of `TimmBackbone`, without building its weights.

    Configs call it, so that a decoder fits the backbone whatever the backbone's name is set to.

    Args:
        name, out_features, output_stride: as for `TimmBackbone`.

    Raises:
        ValueError: as `TimmBackbone`.
    """
    shapes = _all_shapes(name, output_stride)
    unknown = [feature for feature in out_features if feature not in shapes]
    if unknown or not out_features:
        raise ValueError(
            f"out_features={list(out_features)}: {name} has the feature maps {list(shapes)}."
        )
    return {feature: shape for feature, shape in shapes.items() if feature in out_features}


def feature_channels(
    name: str,
    *,
    out_features: Sequence[str] = _DEFAULT_FEATURES,
    output_stride: int | None = None,
) -> dict[str, int]:
    """Channels of the maps of `TimmBackbone` by name: what projectors need to know of it."""
    shapes = feature_shapes(name, out_features=out_features, output_stride=output_stride)
    return {feature: shape.channels for feature, shape in shapes.items()}


def joined_channels(
    name: str,
    *,
    feature: str,
    out_features: Sequence[str] = _DEFAULT_FEATURES,
    output_stride: int | None = None,
) -> dict[str, int]:
    """Channels of a map that joins those of `TimmBackbone`, as HRNetV2's head does, by its name
    `feature`: what the projector of such a map needs to know."""
    channels = feature_channels(name, out_features=out_features, output_stride=output_stride)
    return {feature: sum(channels.values())}


@lru_cache(maxsize=64)
def _all_shapes(name: str, output_stride: int | None) -> dict[str, ShapeSpec]:
    """All maps of a model, from fine to coarse, the deepest named res5."""
    with torch.device("meta"):
        info = _create(name, output_stride, pretrained=False).feature_info
    shapes = zip(info.channels(), info.reduction(), strict=True)
    first = 6 - len(info.channels())
    return {
        f"res{first + i}": ShapeSpec(channels=channels, stride=stride)
        for i, (channels, stride) in enumerate(shapes)
    }


def _create(name: str, output_stride: int | None, *, pretrained: bool, **kwargs: Any):
    _check_name(name)
    if output_stride is not None:
        kwargs["output_stride"] = output_stride
    options = {"features_only": True, **_family_options(name), **kwargs}
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (AssertionError, TypeError, NotImplementedError) as error:
        asked = [key for key in ("output_stride", "drop_path_rate") if key in kwargs]
        if not asked:
            raise
        settings = " and ".join(f"{key}={kwargs[key]}" for key in asked)
        raise ValueError(
            f"{name} cannot have {settings} ({_first_line(error)}): leave unset what it lacks."
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"the pretrained weights of {name} cannot be loaded ({_first_line(error)}): connect to "
            "the network once to download them, or set model.backbone.pretrained=False."
        ) from error


def _check_name(name: str) -> None:
    """Raises where timm has no model of this name, or no weights with this tag."""
    if timm.is_model(name):
        try:
            timm.get_pretrained_cfg(name)
            return
        except RuntimeError:  # the model is known, the tag is not
            known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    else:
        known = timm.list_models()
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"Did you mean {near[0]!r}?" if near else "Leave its tag out."
    raise ValueError(f"timm {timm.__version__} has no model {name!r}. {hint}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _family_options(name: str) -> dict[str, Any]:
    if name.startswith("hrnet"):
        return {"feature_location": ""}  # the branches themselves, not the classification head's
    if name.startswith("swin"):
        return {"strict_img_size": False}
    return {}


def _yields_channels_last(model: nn.Module) -> bool:
    layout = getattr(model, "output_fmt", "NCHW")
    return getattr(layout, "value", layout) == "NHWC"
