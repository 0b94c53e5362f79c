"""Any timm model that yields feature maps, as a detectron2 backbone.

Shape letters: B images, C channels, H W the images, h w a feature map.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..registries import arguments_of
from .freezing import modules_without_training, parameters_of_maps, parameters_of_stages
from .recomputation import recompute_blocks
from .swin import pad_before_shift
from .weights import load_weights_file

_DEFAULT_FEATURES = ("res2", "res3", "res4", "res5")


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """A timm model whose feature maps carry detectron2's names.

    The deepest map is `res5`, the ones before it `res4`, `res3` and so on, whatever their strides:
    strides 4, 8, 16, 32 by default; with `output_stride=8` ResNet's are 4, 8, 8, 8. For HRNet they
    are the four branches, before any fusion head.

    Parameters that no returned map depends on do not train: DistributedDataParallel would wait for
    their gradients.

    Args:
        name: timm's name of the model, e.g. "resnet18", "hrnet_w48",
            "swin_tiny_patch4_window7_224", optionally with a tag of its weights.
        out_features: names of the maps to return.
        output_stride: stride of the deepest map, by dilation; None for the model's own.
        pretrained: load timm's pretrained weights, downloaded on first use.
        weights_file: checkpoint of the timm model to load instead of a download, `.pth` or
            `.safetensors`; see `load_weights_file`.
        norm_outputs: a LayerNorm on each returned map, as segmentation networks on Swin have.
        drop_path_rate: stochastic depth; None for the model's own.
        activation_checkpointing: recompute the activations of each block in the backward pass,
            which takes less memory and more time.
        freeze_at: stages that do not train, counted as in detectron2: 1 for the stem, 2 for the
            stem and all else that res2 depends on, and so on; 0 for none. For HRNet, whose maps all
            come from its last stage: 1 for the stem, n for the stem and the first n - 1 of its four
            stages. In training mode too, what is frozen runs as in evaluation: statistics of norms
            stay, and paths are not dropped.

    Raises:
        ValueError: timm has no such model or weights, or the model no such map, output stride,
            stochastic depth, blocks or stem; the file does not fit the model.
    """

    @configurable
    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = _DEFAULT_FEATURES,
        output_stride: int | None = None,
        pretrained: bool = False,
        weights_file: str | None = None,
        norm_outputs: bool = False,
        drop_path_rate: float | None = None,
        activation_checkpointing: bool = False,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        shapes = feature_shapes(name, out_features=out_features, output_stride=output_stride)
        all_shapes = _all_shapes(name, output_stride)
        self.model = _create(
            name,
            output_stride,
            pretrained=pretrained and weights_file is None,
            out_indices=_indices(name, output_stride, shapes),
            **({} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}),
        )
        if weights_file is not None:
            load_weights_file(self.model, name, weights_file)
        pad_before_shift(self.model)
        if activation_checkpointing and not recompute_blocks(self.model):
            raise ValueError(
                f"activation_checkpointing=True: {name} has no blocks in sequence to recompute; "
                "leave it False."
            )
        self._freeze(name, output_stride, list(shapes), freeze_at)
        self.norms = nn.ModuleDict()
        if norm_outputs:
            self.norms.update({name: nn.LayerNorm(s.channels) for name, s in shapes.items()})
        self._channels_last = _yields_channels_last(self.model)
        self._size_divisibility = max(shape.stride for shape in all_shapes.values())
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """The arguments that MODEL.BACKBONE.OPTIONS of a yaml config holds."""
        return arguments_of(cls, cfg.MODEL.BACKBONE.OPTIONS, "MODEL.BACKBONE.OPTIONS")

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of this, so that all maps have exact strides."""
        return self._size_divisibility

    def _freeze(
        self, name: str, output_stride: int | None, features: list[str], freeze_at: int
    ) -> None:
        """Stops the training of the first stages, and of what the maps do not depend on."""
        maps = _parameters_of_maps(name, output_stride)
        used = set.union(*(maps[feature] for feature in features))
        parameters = dict(self.model.named_parameters())
        for frozen in parameters_of_stages(self.model, maps, freeze_at):
            parameters[frozen].requires_grad_(False)
        self._frozen_modules = modules_without_training(self.model)
        for unused in parameters.keys() - used:
            parameters[unused].requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> TimmBackbone:
        """As of any module; frozen stages stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen_modules:
            self.model.get_submodule(name).eval()
        return self

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
    info = _meta_model(name, output_stride).feature_info
    shapes = zip(info.channels(), info.reduction(), strict=True)
    first = 6 - len(info.channels())
    return {
        f"res{first + i}": ShapeSpec(channels=channels, stride=stride)
        for i, (channels, stride) in enumerate(shapes)
    }


def _indices(name: str, output_stride: int | None, features: Iterable[str]) -> tuple[int, ...]:
    """timm's indices of maps; those of a model's own choice need not begin with 0."""
    indices = _meta_model(name, output_stride).feature_info.out_indices
    by_name = dict(zip(_all_shapes(name, output_stride), indices, strict=True))
    return tuple(by_name[feature] for feature in features)


@lru_cache(maxsize=64)
def _parameters_of_maps(name: str, output_stride: int | None) -> dict[str, set[str]]:
    """Names of the parameters that each of a model's maps depends on."""
    names = _all_shapes(name, output_stride)
    return parameters_of_maps(_meta_model(name, output_stride), names)


@lru_cache(maxsize=4)
def _meta_model(name: str, output_stride: int | None) -> Any:
    """A model with all of its maps, without memory for its weights."""
    with torch.device("meta"):
        return _create(name, output_stride, pretrained=False)


def _create(name: str, output_stride: int | None, *, pretrained: bool, **kwargs: Any):
    _check_name(name)
    if output_stride is not None:
        kwargs["output_stride"] = output_stride
    cfg = timm.get_pretrained_cfg(name) if pretrained else None
    if pretrained and not (cfg and cfg.has_weights):
        raise ValueError(
            f"timm has no pretrained weights of {name}: set model.backbone.pretrained=False."
        )
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
    except Exception as error:  # the hub's client lets through what its HTTP library raises
        if not pretrained:
            raise
        raise ValueError(
            f"the pretrained weights of {name} cannot be loaded ({_first_line(error)}): connect to "
            "the network once to download them, name a local file with "
            "model.backbone.weights_file=FILE, or set model.backbone.pretrained=False."
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
    if name.startswith("swin_"):
        # Without the second, maps that are no larger than a window at the size of the pretraining,
        # those of the last stage, are never shifted, however large the images are.
        return {"strict_img_size": False, "always_partition": True}
    if name.startswith("swin"):
        return {"strict_img_size": False}
    return {}


def _yields_channels_last(model: nn.Module) -> bool:
    layout = getattr(model, "output_fmt", "NCHW")
    return getattr(layout, "value", layout) == "NHWC"
