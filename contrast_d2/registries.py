"""What a yaml config calls by name, with options by keyword, where detectron2 has no keys for it.

Names of contrast methods and losses are those of presets in `configs/common`. Options are arguments
in upper case: {NAME: pixel_memory, OPTIONS: {FEATURE: p2, MEMORY: {REGIONS_PER_CLASS: 367}}} sets
`feature` of the preset `pixel_memory`, and `regions_per_class` of its `memory`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import locate
from fvcore.common.registry import Registry
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .resources import resource

CONTRAST_REGISTRY = Registry("CONTRAST")
CONTRAST_REGISTRY.__doc__ = """Functions () -> `LazyCall` of a contrast method.

In it, "${channels}" stands for the channels of all maps of backbone and decoder by name,
"${dataset.num_classes}" and "${dataset.ignore_label}" for the labels."""

SEG_LOSS_REGISTRY = Registry("SEG_LOSS")
SEG_LOSS_REGISTRY.__doc__ = "Functions () -> `LazyCall` of a `SegLoss`; labels as in CONTRAST."

_PRESETS = (
    (CONTRAST_REGISTRY, "contrast/ms_cs", "ms ms_cs ms_cs_paper ms_cs_release"),
    (CONTRAST_REGISTRY, "contrast/pixel", "pixel pixel_memory pixel_memory_semi_hard"),
    (CONTRAST_REGISTRY, "contrast/pixel", "pixel_memory_paper pixel_release pixel_memory_release"),
    (CONTRAST_REGISTRY, "contrast/pixel", "pixel_memory_correct"),
    (CONTRAST_REGISTRY, "contrast/comparators", "region prototypes clusters centres"),
    (CONTRAST_REGISTRY, "contrast/contextrast", "contextrast"),
    (CONTRAST_REGISTRY, "contrast/pne", "pne pne_release"),
    (SEG_LOSS_REGISTRY, "losses", "aaf cross_entropy cross_entropy_lovasz dice focal lovasz"),
    (SEG_LOSS_REGISTRY, "losses", "ohem rmi rmi_max"),
)


def common(file: str, name: str) -> DictConfig:
    """A definition of `configs/common/<file>.py`."""
    return LazyConfig.load(str(resource("configs") / f"common/{file}.py"), name)  # pyright: ignore[reportReturnType]


def _preset(file: str, name: str) -> Callable[[], DictConfig]:
    def preset() -> DictConfig:
        node = common(file, name)
        if "channels" in node:
            node.channels = "${channels}"  # methods drop heads that they do not use
        return node

    preset.__name__ = name
    return preset


for _registry, _file, _names in _PRESETS:
    for _name in _names.split():
        _registry.register(_preset(_file, _name))


def find(registry: Registry, name: str) -> Any:
    """What a registry has under a name. Raises ValueError where it has nothing."""
    if name not in registry:
        raise ValueError(
            f"{name!r} is not in the {registry._name} registry. "
            f"{did_you_mean(name, [known for known, _ in registry])} A module of your own that "
            "registers it is imported by --import MODULE."
        )
    return registry.get(name)


def build_named(
    registry: Registry, section: Mapping[str, Any], path: str, known: Mapping[str, Any]
) -> nn.Module:
    """Builds what a section, which `path` names, chooses from a registry by NAME and OPTIONS.

    Args:
        known: what interpolations of the preset refer to.

    Raises:
        ValueError: there is no such name or option.
    """
    node = find(registry, section["NAME"])()
    set_options(node, section["OPTIONS"], f"{path}.OPTIONS")
    return instantiate(
        OmegaConf.create({**known, "part": node}, flags={"allow_objects": True}).part
    )


def arguments_of(
    factory: Callable[..., Any], options: Mapping[str, Any], path: str, **given: Any
) -> dict[str, Any]:
    """The arguments of a callable: those given, and the options that a section `path` holds.

    Raises:
        ValueError: there is no such argument, or one without default is missing.
    """
    node = L(factory)()
    set_options(node, options, path, given)
    values: dict[str, Any] = OmegaConf.to_container(node)  # pyright: ignore[reportAssignmentType]
    del values["_target_"]
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.default is parameter.empty and name not in (*given, *values):
            raise ValueError(f"{path}.{name.upper()} is not set, and has no default: set it.")
    return {**given, **values}


def set_options(
    node: DictConfig, options: Mapping[str, Any], path: str, given: Collection[str] = ()
) -> None:
    """Sets keys of a config, also arguments that its callable would take and it does not mention.

    Args:
        node: changed in place.
        options: values by key in upper case. A mapping whose own keys are in upper case holds
            options of a config inside of this one.
        path: of the options, for messages.
        given: keys that are set elsewhere, and so are unknown here.

    Raises:
        ValueError: an unknown key.
    """
    current: dict[Any, Any] = OmegaConf.to_container(node, resolve=False)  # pyright: ignore[reportAssignmentType]
    target = current.pop("_target_", dict)
    target = locate(target) if isinstance(target, str) else target
    if target is not dict:  # which takes any key
        arguments = inspect.signature(target).parameters
        current = {**{name: argument.default for name, argument in arguments.items()}, **current}
    for key, value in options.items():
        name, full = key.lower(), f"{path}.{key}"
        if name in given:
            raise ValueError(f"{full}: detectron2 has a key of its own for it.")
        if name not in current:
            near = did_you_mean(full, [f"{path}.{n.upper()}" for n in current if n not in given])
            raise ValueError(f"unknown config key {full}. {near}")
        old = current[name]
        if isinstance(value, Mapping) and not isinstance(old, Mapping):
            raise ValueError(f"{full}={plain(value)}: has no keys here. Name another preset.")
        if isinstance(value, Mapping) and ("_target_" in old or all(k.isupper() for k in value)):
            set_options(node[name], value, full)
            continue
        is_link = isinstance(old, str) and old.startswith(("${", "???"))
        for kind in () if is_link or value is None else (bool, (int, float), str, Mapping):
            if isinstance(old, kind) and not isinstance(value, kind):
                raise ValueError(f"{full}={value!r}: needs a value like {old!r}.")
        node[name] = plain(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question for the nearest of what is known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"Did you mean {near[0]}?" if near else ""


def plain(value: Any) -> Any:
    """A value of a yaml config as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
