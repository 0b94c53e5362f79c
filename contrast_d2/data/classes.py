"""The classes of a dataset: their names, colours and values in the label files, read from JSON.

The built-in datasets have their files in ``catalog/``; a user's folder has a ``dataset.json`` with
the same entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.utils.file_io import PathManager

Color = tuple[int, int, int]

_CLASS_KEYS = {"name", "color", "ids"}


class Classes(NamedTuple):
    """The classes of a dataset, in contiguous order, and how its label files encode them."""

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    """RGB, 0..255, of each class."""
    ids: tuple[tuple[int, ...], ...]
    """The values of each class in the label files, at least one."""
    void_ids: tuple[int, ...]
    """Values in the label files that mean "not labelled"."""
    groups: Mapping[str, tuple[int, ...]] = {}
    """Contiguous ids of the classes of each group that is scored on its own."""

    @property
    def id_to_class(self) -> dict[int, int]:
        """Value in the label files to contiguous class id."""
        return {value: k for k, values in enumerate(self.ids) for value in values}


def distinct_colors(count: int) -> tuple[Color, ...]:
    """Colours for classes that come without any: those of PASCAL VOC, without its black.

    The bits of 1, 2, 3 ... are dealt out to red, green and blue in turn, the lowest bits to the
    highest ones, so that neighbours differ much and no two are equal.

    Args:
        count: how many, at most 255.

    Returns:
        ``count`` different RGB colours, 0..255.

    Reference: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010; the
        colour map of its development kit.
    """
    colors = []
    for index in range(1, count + 1):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colors.append(tuple(channels))
    return tuple(colors)


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: if the file cannot be read or holds something else. The message names it.
    """
    try:
        with PathManager.open(path, "r") as file:
            data = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, {{...}}, not a {type(data).__name__}")
    return data


def parse_classes(data: Mapping[str, Any], source: str) -> Classes:
    """Takes the classes from a JSON object.

    Args:
        data: ``classes``, a list of names or of objects with ``name``, ``color`` (RGB, 0..255;
            default: one of `distinct_colors`) and ``ids`` (values in the label files; default: the
            position in the list); ``void_ids``, default [255]; ``groups``, name to list of class
            names, default none. Other entries are left to the caller.
        source: the file's name, for messages.

    Raises:
        ValueError: if an entry is missing, unknown or contradicts another.
    """
    rows = data.get("classes")
    if not isinstance(rows, list) or not 1 <= len(rows) <= 255:
        raise ValueError(f"{source}: 'classes' must be a list of 1 to 255 classes, got {rows!r}")
    rows = [{"name": row} if isinstance(row, str) else row for row in rows]
    defaults = distinct_colors(len(rows))
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise ValueError(f"{source}: a class must be a name or an object with 'name': {row!r}")
        if unknown := sorted(row.keys() - _CLASS_KEYS):
            raise ValueError(
                f"{source}: class {row['name']!r} has unknown entries {unknown}; known are "
                f"{sorted(_CLASS_KEYS)}"
            )
    names = tuple(row["name"] for row in rows)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{source}: class names must differ, but {twice} occur twice")
    classes = Classes(
        names,
        tuple(_color(row.get("color", defaults[k]), row, source) for k, row in enumerate(rows)),
        tuple(_ids(row.get("ids", [k]), row["name"], source) for k, row in enumerate(rows)),
        _ids(data.get("void_ids", [255]), "void_ids", source),
        _groups(data.get("groups", {}), names, source),
    )
    _check_ids(classes, source)
    return classes


def _check_ids(classes: Classes, source: str) -> None:
    """Raises where a label value means two things, or a class has no value."""
    seen: dict[int, str] = dict.fromkeys(classes.void_ids, "void")
    for name, values in zip(classes.names, classes.ids, strict=True):
        if not values:
            raise ValueError(f"{source}: class {name!r} has no label value: fill its 'ids'")
        for value in values:
            if value in seen:
                raise ValueError(
                    f"{source}: label value {value} is both {seen[value]!r} and {name!r}: correct "
                    "'ids' or 'void_ids'"
                )
            seen[value] = name


def _color(value: Any, row: Mapping[str, Any], source: str) -> Color:
    if not _integers(value) or len(value) != 3 or not all(0 <= v <= 255 for v in value):
        raise ValueError(
            f"{source}: the color of {row['name']!r} must be three integers in 0..255, got {value}"
        )
    return tuple(value)


def _ids(value: Any, what: str, source: str) -> tuple[int, ...]:
    if not _integers(value) or not all(0 <= v < 2**16 for v in value):
        raise ValueError(
            f"{source}: the label values of {what!r} must be a list of integers in 0..65535, got "
            f"{value!r}"
        )
    return tuple(value)


def _groups(value: Any, names: Sequence[str], source: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, dict):
        raise ValueError(f"{source}: 'groups' must map names to lists of classes, got {value!r}")
    for group, members in value.items():
        if not isinstance(members, list) or not set(members) <= set(names):
            raise ValueError(f"{source}: group {group!r} must list names of classes: {members!r}")
    return {group: tuple(names.index(m) for m in members) for group, members in value.items()}


def _integers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(v) is int for v in value)
