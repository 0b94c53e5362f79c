"""Arguments of a callable as keys of a yacs config, and back: one rule for every part of a model.

The argument `max_anchors` becomes the key MAX_ANCHORS, with its default. An argument that takes an
object of a class becomes a section with that class's arguments; where it may be None as well, its
key ENABLED says whether there is one. A mapping becomes a section that takes any keys. An argument
for which a module of any kind will do takes a registered name.

yacs holds a value to the type of its default. Where that would be too strict, the key starts as
None: where the argument has no default, or takes several types. None then stands for the default.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from omegaconf import DictConfig
from torch import nn

REQUIRED = inspect.Parameter.empty
ENABLED = "ENABLED"
# Where the classes are from whose objects are values of a config.
_VALUES = ("builtins", "collections", "typing", "torch")


class Argument(NamedTuple):
    """An argument of a callable."""

    name: str
    default: Any
    """`REQUIRED` where there is none."""
    types: tuple[Any, ...]
    """The alternatives of its annotation, without None."""
    optional: bool
    """Whether None is a value of its own."""

    @property
    def key(self) -> str:
        return self.name.upper()

    @property
    def is_mapping(self) -> bool:
        return any(typing.get_origin(t) is Mapping for t in self.types)

    def takes(self, base: type) -> bool:
        """Whether any object of a base class will do, or a mapping of names to such objects."""
        return base in self.types or any(base in typing.get_args(t) for t in self.types)

    @property
    def part(self) -> type | None:
        """The class whose object the argument is, if it is one with arguments of its own."""
        (kind,) = self.types if len(self.types) == 1 else (None,)
        if not isinstance(kind, type) or typing.get_origin(kind) is not None:
            return None
        is_value = kind.__module__.partition(".")[0] in _VALUES
        return None if is_value else kind


def arguments(factory: Callable[..., Any]) -> list[Argument]:
    """All arguments of a class or function, in order."""
    function = factory.__init__ if isinstance(factory, type) else factory
    hints = typing.get_type_hints(function)
    found = []
    for parameter in inspect.signature(factory).parameters.values():
        hint = hints.get(parameter.name, Any)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if is_union else (hint,)
        others = tuple(kind for kind in kinds if kind is not types.NoneType)
        found.append(Argument(parameter.name, parameter.default, others, len(others) < len(kinds)))
    return found


def section_of(
    factory: Callable[..., Any], given: Collection[str] = (), base: type = nn.Module
) -> CfgNode:
    """The arguments of a callable as a section of a yacs config.

    Args:
        factory: a class or function with annotated arguments.
        given: names of arguments that come from elsewhere; they get no key.
        base: class of the parts that are referred to by name.
    """
    node = CfgNode()
    for argument in arguments(factory):
        if argument.name in given:
            continue
        if argument.takes(base) and not argument.is_mapping:
            node[argument.key] = None
        elif argument.is_mapping:
            default = {} if argument.default in (REQUIRED, None) else dict(argument.default)
            node[argument.key] = CfgNode(default, new_allowed=True)
        elif argument.part is not None:
            outside = [*given, *_links(argument, factory)]
            node[argument.key] = section_of(argument.part, outside, base)
            if argument.optional:
                node[argument.key][ENABLED] = False
        else:
            node[argument.key] = _yacs_default(argument)
    return node


def call_of(
    factory: Callable[..., Any],
    section: CfgNode,
    path: str,
    given: Mapping[str, Any],
    named: Callable[[str], Any] | None = None,
    base: type = nn.Module,
) -> DictConfig:
    """The LazyCall of a callable with the arguments that a section of a yacs config holds.

    Args:
        factory: a class or function with annotated arguments.
        section: as made by `section_of`, with values filled in.
        path: of the section, for messages.
        given: arguments that come from elsewhere; those that the callable lacks are left out.
        named: makes the config of a part from its registered name.
        base: class of the parts that are referred to by name.

    Raises:
        ValueError: an argument without default is not set.
    """
    values = {}
    for argument in arguments(factory):
        name, key = argument.name, f"{path}.{argument.key}"
        if name in given:
            values[name] = given[name]
            continue
        value = section[argument.key]
        if argument.takes(base):
            values[name] = _of_names(argument, value, key, named)
        elif argument.is_mapping:
            values[name] = dict(value) or _default(argument, key)
        elif argument.part is not None:
            outside = {**_links(argument, factory), **given}
            absent = argument.optional and not value[ENABLED]
            values[name] = (
                None if absent else call_of(argument.part, value, key, outside, named, base)
            )
        else:
            unset = value is None and not argument.optional
            values[name] = _default(argument, key) if unset else value
    return L(factory)(**values)


def _links(argument: Argument, factory: Callable[..., Any]) -> dict[str, str]:
    """What a part takes over from the object that it is a part of, as interpolations.

    It has the value of each argument that both have, and of each argument without default that
    another part of the same object has.
    """
    outer = arguments(factory)
    links = {other.name: f"${{..{other.name}}}" for other in outer}
    required = [own.name for own in arguments(argument.part) if own.default is REQUIRED]  # pyright: ignore[reportArgumentType]
    for other in outer:
        if other.part is not None and other != argument:
            shared = [inner.name for inner in arguments(other.part) if inner.name in required]
            links.update({name: f"${{..{other.name}.{name}}}" for name in shared})
    return links


def _of_names(argument: Argument, value: Any, key: str, named: Callable[[str], Any] | None) -> Any:
    """Configs of the parts that a name, or a mapping of names, refers to."""
    assert named is not None
    if argument.is_mapping:
        parts = {name: named(part) for name, part in dict(value).items()}
        return L("builtins.dict")(**parts) if parts else _default(argument, key)
    return named(value) if value else _default(argument, key)


def _default(argument: Argument, key: str) -> Any:
    if argument.default is REQUIRED:
        raise ValueError(f"{key} is not set, and has no default: set it.")
    return argument.default


def _yacs_default(argument: Argument) -> Any:
    default = argument.default
    if default is REQUIRED or default is None or len(argument.types) > 1:
        return None
    return float(default) if argument.types == (float,) else default
