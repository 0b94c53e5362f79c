"""The model that a yaml config stands for; detectron2's registries build it by the same way.

Shapes that one part must know of another, channels of feature maps above all, stand in the tree as
numbers: the bridge builds backbone and decoder without memory, and looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    Backbone,
)
from fvcore.common.registry import Registry
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..backbones import TimmBackbone, without_starting_weights
from ..contrast import ContrastMethod
from ..losses import SegLoss
from ..segmentor import ContrastiveSegmentor
from ..structures import SegOutput
from .keys import (
    CONTRAST_REGISTRY,
    DECODERS,
    HEAD_KEYS,
    SEG_LOSS_REGISTRY,
    SHARED,
    add_contrast_config,
    changed,
    find,
    section_name,
)
from .read_keys import ReadKeys
from .signatures import arguments, call_of

# What backbones are built for.
_IMAGES = ShapeSpec(channels=3)


def model_tree(cfg: ReadKeys, dataset: Mapping[str, Any]) -> DictConfig:
    """The model's part of the tree; what a part must know of another is written down as numbers."""
    if cfg.MODEL.META_ARCHITECTURE != "ContrastiveSegmentor":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE={cfg.MODEL.META_ARCHITECTURE!r}: set ContrastiveSegmentor."
        )
    backbone = _backbone(cfg)
    shapes = _shapes_of(backbone)
    head = _sem_seg_head(cfg, cfg.MODEL.SEM_SEG_HEAD.NAME, shapes)
    channels = _channels_of_maps(head, shapes, dataset)
    name = cfg.MODEL.CONTRAST.NAME
    return L(ContrastiveSegmentor)(
        backbone=backbone,
        sem_seg_head=head,
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
        seg_loss=call_of(
            SegLoss, cfg.MODEL.SEG_LOSS, "MODEL.SEG_LOSS", {}, lambda name: _loss(cfg, name)
        ),
        contrast=_contrast(cfg, name, channels) if name else None,
        ignore_label=SHARED["ignore_label"],
    )


def labels_of(cfg: CfgNode) -> dict[str, int]:
    """What the parts of a model know of the classes."""
    head = cfg.MODEL.SEM_SEG_HEAD
    return {"num_classes": head.NUM_CLASSES, "ignore_label": head.IGNORE_VALUE}


def _backbone(cfg: ReadKeys) -> DictConfig:
    name = cfg.MODEL.BACKBONE.NAME
    if name == TimmBackbone.__name__:
        return _part(cfg.MODEL, "MODEL", TimmBackbone)
    build = find(BACKBONE_REGISTRY, name)
    settings = _settings_read(cfg, lambda keys: build(keys, _IMAGES))
    return L(build_registered_backbone)(name=name, settings=settings)


def build_registered_backbone(name: str, settings: Mapping[str, Any]) -> Backbone:
    """Builds what detectron2's BACKBONE_REGISTRY has under a name.

    Args:
        name: as registered.
        settings: keys of a yacs config that are not at their defaults, as nested mappings.

    Raises:
        ValueError: nothing is registered under the name.
    """
    return find(BACKBONE_REGISTRY, name)(_config_with(settings), _IMAGES)


def _shapes_of(backbone: DictConfig) -> dict[str, ShapeSpec]:
    """The maps of a backbone, built without its weights."""
    backbone = without_starting_weights(backbone)
    return _without_memory(lambda: instantiate(backbone).output_shape())


def _sem_seg_head(cfg: ReadKeys, name: str, shapes: Mapping[str, ShapeSpec]) -> DictConfig:
    head = cfg.MODEL.SEM_SEG_HEAD
    missing = [feature for feature in head.IN_FEATURES if feature not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES={list(head.IN_FEATURES)}: {cfg.MODEL.BACKBONE.NAME} "
            f"has the maps {list(shapes)}."
        )
    taken = {feature: shapes[feature] for feature in head.IN_FEATURES}
    specs = {n: L(ShapeSpec)(channels=s.channels, stride=s.stride) for n, s in taken.items()}
    input_shape = L("builtins.dict")(**specs)
    if name not in DECODERS:
        build = find(SEM_SEG_HEADS_REGISTRY, name)
        settings = _settings_read(cfg, lambda keys: build(keys, taken))
        return L(build_registered_head)(name=name, settings=settings, input_shape=input_shape)
    own = [argument.name for argument in arguments(DECODERS[name])]
    given = {argument: head[key] for argument, key in HEAD_KEYS.items() if argument in own}
    given["input_shape"] = input_shape
    return _part(head, "MODEL.SEM_SEG_HEAD", DECODERS[name], given)


def build_registered_head(
    name: str, settings: Mapping[str, Any], input_shape: Mapping[str, ShapeSpec]
) -> nn.Module:
    """Builds what detectron2's SEM_SEG_HEADS_REGISTRY has under a name: maps -> `SegOutput`.

    Args:
        name: as registered.
        settings: keys of a yacs config that are not at their defaults, as nested mappings.
        input_shape: channels and strides of the maps to use.

    Raises:
        ValueError: nothing is registered under the name.
    """
    return find(SEM_SEG_HEADS_REGISTRY, name)(_config_with(settings), dict(input_shape))


def _channels_of_maps(
    head: DictConfig, shapes: Mapping[str, ShapeSpec], dataset: Mapping[str, Any]
) -> dict[str, int]:
    """Channels of all maps of backbone and decoder, by name: the decoder is run to see its own."""
    side = 8 * max(shape.stride for shape in shapes.values())

    def run() -> dict[str, int]:
        maps = {n: torch.zeros(2, s.channels, *[side // s.stride] * 2) for n, s in shapes.items()}
        with torch.no_grad():
            output = _instantiate(head, dataset).eval()(maps)
        if not isinstance(output, SegOutput):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NAME={head.name!r} returns a {type(output).__name__}: choose "
                f"a decoder that returns a SegOutput, such as {', '.join(DECODERS)}."
            )
        return {name: x.shape[1] for name, x in {**maps, **output.features}.items()}

    return _without_memory(run)


def _contrast(cfg: CfgNode, name: str, channels: Mapping[str, int]) -> DictConfig:
    """A method; its projector has a head for each map whose name is among the method's settings."""
    method = find(CONTRAST_REGISTRY, name)
    node = _part(
        cfg.MODEL.CONTRAST,
        "MODEL.CONTRAST",
        method,
        named=lambda other: _contrast(cfg, other, channels),
        base=ContrastMethod,
    )
    if "projector" in node:
        words = set(_strings(OmegaConf.to_container(node, resolve=False)))
        node.projector.in_channels = {n: c for n, c in channels.items() if n in words}
    return node


def _strings(value: Any) -> Iterator[str]:
    """All strings among the keys and values of nested containers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _loss(cfg: CfgNode, name: str) -> DictConfig:
    loss = find(SEG_LOSS_REGISTRY, name)
    return _part(cfg.MODEL.SEG_LOSS, "MODEL.SEG_LOSS", loss, named=lambda n: _loss(cfg, n))


def _part(
    section: CfgNode,
    path: str,
    factory: Callable[..., Any],
    given: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> DictConfig:
    """The LazyCall of a part that has a section of its own below a section."""
    key = section_name(factory)
    given = {**SHARED, **(given or {})}
    return call_of(factory, section[key], f"{path}.{key}", given, **kwargs)


def _settings_read(cfg: ReadKeys, build: Callable[[CfgNode], Any]) -> dict[str, Any]:
    """The keys that a registered builder reads and that are not at their defaults, nested."""
    read: set[str] = set()
    _without_memory(lambda: build(ReadKeys(cfg.plain, read)))
    cfg.read.update(read)
    nested: dict[str, Any] = {}
    for key, value in changed(cfg.plain, also_unknown=True).items():
        if key in read:
            *path, last = key.split(".")
            node = nested
            for section in path:
                node = node.setdefault(section, {})
            node[last] = value
    return nested


def _config_with(settings: Mapping[str, Any]) -> CfgNode:
    """The default config with some keys set, also with such as only its owner knows."""
    if isinstance(settings, DictConfig):
        settings = OmegaConf.to_container(settings)  # pyright: ignore[reportAssignmentType]
    cfg = get_cfg()
    add_contrast_config(cfg)
    cfg.set_new_allowed(True)
    cfg.merge_from_other_cfg(CfgNode(dict(settings)))
    return cfg


def _instantiate(node: DictConfig, dataset: Mapping[str, Any]) -> nn.Module:
    """A part of the model, outside of the tree in which its interpolations would find the rest."""
    tree = {"dataset": dict(dataset), "part": node}
    return instantiate(OmegaConf.create(tree, flags={"allow_objects": True}).part)


def _without_memory(build: Callable[[], Any]) -> Any:
    """Calls a function that builds modules for their shapes: on the meta device if they can be."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError):
            return build()


def _build_segmentor(cfg: CfgNode) -> nn.Module:
    labels = labels_of(cfg)
    return _instantiate(model_tree(ReadKeys(cfg, set()), labels), labels)


def _build_timm(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return instantiate(_part(cfg.MODEL, "MODEL", TimmBackbone))


def _head_builder(name: str) -> Callable[..., nn.Module]:
    def build(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
        return _instantiate(_sem_seg_head(ReadKeys(cfg, set()), name, input_shape), labels_of(cfg))

    return build


def _register(registry: Registry, name: str, build: Callable[..., nn.Module]) -> None:
    """Registers a function that takes a yacs config, detectron2's convention, under a name."""
    build.__name__ = name
    registry.register(build)


_register(META_ARCH_REGISTRY, ContrastiveSegmentor.__name__, _build_segmentor)
_register(BACKBONE_REGISTRY, TimmBackbone.__name__, _build_timm)
for _name in DECODERS:
    _register(SEM_SEG_HEADS_REGISTRY, _name, _head_builder(_name))
