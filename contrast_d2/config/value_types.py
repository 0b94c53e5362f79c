"""Whether the values of a config are of the types that the callables which it describes take."""

from __future__ import annotations

import collections.abc
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Whose annotations are told the truth by; PyTorch's name types that no config can hold.
_CHECKED = ("contrast_d2", "detectron2", "fvcore")
_SCALARS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Set)
_MAPPINGS = (dict, collections.abc.Mapping)


def check_value_types(cfg: DictConfig) -> None:
    """Compares all arguments of our callables and of detectron2's with their annotations.

    Raises:
        ValueError: a value of another type.
    """
    for path, node in _calls(cfg, ""):
        target = node["_target_"]
        target = locate(target) if isinstance(target, str) else target
        if (getattr(target, "__module__", None) or "").partition(".")[0] not in _CHECKED:
            continue
        for name, hint in _hints(target).items():
            if name not in node:
                continue
            try:
                value = node[name]  # an interpolation gives what it stands for
            except OmegaConfBaseException:  # not set, or made of something that is not
                continue
            if not _fits(value, hint):
                raise ValueError(f"{path}{name}={_shown(value)}: needs {_described(hint)}.")


def check_replacement(key: str, old: Any, new: Any) -> None:
    """Compares the value of an override with the one that it replaces.

    A number may replace a number, a list a text and None anything: what else is wrong with them is
    for annotations and constructors to say.

    Raises:
        ValueError: they are of different kinds.
    """
    if old is None or new is None or old == "???":
        return
    for kinds, allowed, needed in (
        (bool, bool, "True or False"),
        ((int, float), (int, float), "a number"),
        (str, (str, list, ListConfig), "a text"),
        ((list, ListConfig), (list, ListConfig, str), "a list"),
        ((dict, DictConfig), (dict, DictConfig), "keys and values, or None"),
    ):
        if isinstance(old, kinds):
            is_bool = isinstance(new, bool) and kinds is not bool
            if is_bool or not isinstance(new, allowed):
                raise ValueError(f"{key}={_shown(new)}: needs {needed}.")
            return


def _calls(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """The nodes of a config that describe a call, with the start of their keys."""
    if isinstance(node, DictConfig):
        if node._is_none() or node._is_missing():
            return
        if "_target_" in node:
            yield path, node
        names: list[Any] = [name for name in node if not OmegaConf.is_interpolation(node, name)]  # pyright: ignore[reportArgumentType]
    elif isinstance(node, ListConfig):
        names = list(range(len(node)))
    else:
        return
    for name in names:
        if not OmegaConf.is_missing(node, name):
            yield from _calls(node._get_node(name), f"{path}{name}.")


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if isinstance(target, type) else target
    hints = typing.get_type_hints(function)
    hints.pop("return", None)
    return hints


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = get_origin(hint) in (typing.Union, types.UnionType)
    return get_args(hint) if is_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_kind(value, kind) for kind in _alternatives(hint))


def _fits_kind(value: Any, kind: Any) -> bool:
    if isinstance(value, DictConfig) and "_target_" in value:
        return kind not in _SCALARS or kind is str  # an object; a call may also give a text
    origin = get_origin(kind) or kind
    if kind is types.NoneType or value is None:
        return value is None and kind in (types.NoneType, Any)
    if origin is Literal:
        return value in get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in _SCALARS:
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if origin in _LISTS:
        return isinstance(value, (ListConfig, list, tuple)) and _fit_items(value, kind)
    if origin in _MAPPINGS:
        return isinstance(value, (DictConfig, dict))
    # An object cannot be written down; what is no plain value may be one already.
    return kind is Any or not isinstance(value, (str, int, float, bool, ListConfig))


def _fit_items(values: Any, kind: Any) -> bool:
    items = get_args(kind)
    # detectron2 writes Tuple[float] for any number of them.
    if get_origin(kind) is tuple and len(items) > 1 and items[-1] is not Ellipsis:
        if len(values) != len(items):
            return False
        return all(_fits(value, item) for value, item in zip(values, items, strict=True))
    return not items or all(_fits(value, items[0]) for value in values)


def _described(hint: Any) -> str:
    return " or ".join(_described_kind(kind) for kind in _alternatives(hint))


def _described_kind(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if kind is types.NoneType:
        return "None"
    if kind in _SCALARS:
        return _SCALARS[kind]
    if origin is Literal:
        return f"one of {list(get_args(kind))}"
    if origin in _LISTS:
        items = [item for item in get_args(kind) if item is not Ellipsis]
        return f"a list of ({', '.join(_described(item) for item in items)})" if items else "a list"
    if origin in _MAPPINGS:
        return "keys and values"
    return f"a {getattr(kind, '__name__', None) or origin}, as _target_ with its arguments"


def _shown(value: Any) -> str:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    text = repr(plain)
    return text if len(text) <= 80 else text[:77] + "..."
