"""What an ablation compares, read from a small yaml file.

    title: Scales that are contrasted
    baseline: none
    seeds: [0, 1, 2]
    overrides: [train.max_iter=1500]       # of all variants; optional
    source: Table 1(a) of a paper          # of the published numbers; optional
    variants:
      none:
        config: configs/camvid/semfpn_r18_base_cpu.py
        published: "79.1"
      one_scale:
        config: configs/camvid/semfpn_r18_ms_cs_cpu.py
        overrides: [model.contrast.cross_scale=[]]

Its name is that of the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_KEYS = {"title", "baseline", "seeds", "overrides", "source", "variants"}
_NEEDED = ("title", "baseline", "seeds", "variants")
_VARIANT_KEYS = {"config", "overrides", "published"}
# A cell is these three; a definition that set one of them would contradict it.
_SET_BY_CELLS = ("train.seed", "train.output_dir")


class Variant(NamedTuple):
    """One row of an ablation.

    Attributes:
        name: part of the names of its folders.
        config: its experiment file.
        overrides: "key=value", those of all variants first.
        published: what the paper has in its place, as text; "" where it has nothing.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    published: str


class Ablation(NamedTuple):
    """Variants of an experiment, to be trained with the same seeds.

    Attributes:
        name: of its results and its folder.
        title: what it compares, in a line.
        source: where the published numbers are from, and of which model and data they are; "" where
            there are none.
        seeds: each variant is trained with every one of them.
        variants: the baseline first.
    """

    name: str
    title: str
    source: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]

    @property
    def baseline(self) -> str:
        """The name of the variant that all others are compared with."""
        return self.variants[0].name


def read_definition(path: str | Path) -> Ablation:
    """Reads a definition.

    Args:
        path: of the yaml file.

    Raises:
        ValueError: it cannot be read, a key is unknown or missing, or a value is of no use.
    """
    path = Path(path)
    content = _read(path)
    _check_keys(content, _KEYS, str(path))
    for key in _NEEDED:
        if key not in content:
            raise ValueError(f"{path} has no {key}.")
    shared = _overrides(content.get("overrides", []), f"{path}: overrides")
    source = _text(content.get("source", ""), f"{path}: source")
    rows = content["variants"]
    if not isinstance(rows, dict) or len(rows) < 2:
        raise ValueError(f"{path}: variants={rows!r}: needs two or more, each with a config.")
    variants = {str(name): _variant(name, row, shared, path) for name, row in rows.items()}
    if not source and any(variant.published for variant in variants.values()):
        raise ValueError(f"{path} has published numbers, but no source that says whose.")
    baseline = str(content["baseline"])
    if baseline not in variants:
        raise ValueError(f"{path}: baseline={baseline}: must be one of {', '.join(variants)}.")
    first = variants.pop(baseline)
    return Ablation(
        name=path.stem,
        title=_text(content["title"], f"{path}: title"),
        source=source,
        seeds=_seeds(content["seeds"], path),
        variants=(first, *variants.values()),
    )


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which yaml takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} occurs twice")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys: it needs {', '.join(_NEEDED)}.")
    return content


def _check_keys(content: Mapping[Any, Any], known: set[str], where: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} has an unknown key {key}. Did you mean {near}?")


def _variant(name: Any, row: Any, shared: tuple[str, ...], path: Path) -> Variant:
    where = f"{path}: variants.{name}"
    # Folders and results are named by it, and a seed is parted from it by `_seed`.
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
        raise ValueError(f"{where}: name it with letters, digits, - and _.")
    if not isinstance(row, dict) or not isinstance(row.get("config"), str):
        raise ValueError(f"{where}={row!r}: needs a config, the path of an experiment file.")
    _check_keys(row, _VARIANT_KEYS, where)
    own = _overrides(row.get("overrides", []), f"{where}.overrides")
    published = _text(row.get("published", ""), f"{where}.published")
    return Variant(str(name), row["config"], (*shared, *own), published)


def _overrides(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise ValueError(f"{where}={values!r}: needs a list of key=value.")
    for text in values:
        if text.partition("=")[0] in _SET_BY_CELLS:
            raise ValueError(f"{where}: {text}: seeds and folders are those of the ablation.")
    return tuple(values)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}={value!r}: needs a text; put it in quotes.")
    return value


def _seeds(values: Any, path: Path) -> tuple[int, ...]:
    whole = isinstance(values, list) and all(type(seed) is int and seed >= 0 for seed in values)
    if not whole or not values or len(set(values)) != len(values):
        raise ValueError(f"{path}: seeds={values!r}: needs a list of different numbers from 0 on.")
    return tuple(values)
