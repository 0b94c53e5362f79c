"""Loading an experiment file and applying the command line's overrides to it."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Reads a LazyConfig file.

    Args:
        path: of a `.py` file, or of a `.yaml` that a run has saved. Either can run code.
        overrides: "key=value", in hydra's grammar; None and null both mean None. A key is one of
            the config, or an argument with a default of the callable that the config names there.

    Raises:
        ValueError: no such file, a malformed override or an unknown key.
    """
    if not path:
        raise ValueError("--config-file is missing: name an experiment file under configs/.")
    if not os.path.isfile(path):
        raise ValueError(f"--config-file {path}: there is no such file.")
    cfg = LazyConfig.load(path)
    for override in _parse(overrides):
        _apply(cfg, override)
    return cfg


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if text.startswith("--"):
            raise ValueError(f"{text}: flags go before the key=value overrides.")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"cannot read the override {text!r} ({reason}): write key=value, and quote values "
                "with special characters, key='\"value\"'."
            ) from error
        if override.type is None or override.is_delete() or override.is_sweep_override():
            raise ValueError(f"the override {text!r} is not of the form key=value.")
        parsed.append(override)
    return parsed


def _apply(cfg: DictConfig, override: Override) -> None:
    key, value = override.key_or_group, override.value()
    if value == "None":  # hydra's grammar knows null only
        value = None
    _check_key(cfg, key)
    OmegaConf.update(cfg, key, value, merge=True, force_add=True)


def _check_key(cfg: DictConfig, key: str) -> None:
    """Raises where no part of the config, and no callable that it names, knows the key."""
    node: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        if node is None:
            raise ValueError(f"cannot set {key}: {path} is None.")
        if isinstance(node, ListConfig):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(
                    f"cannot set {key}: {path} is a list of {len(node)}, indexed from 0."
                )
            node = node[int(part)]
        elif not isinstance(node, DictConfig):
            raise ValueError(f"cannot set {key}: {path} is the value {node!r}.")
        elif part in node:
            node = OmegaConf.select(node, part)
        elif depth == len(parts) - 1 and part in _arguments(node):
            return
        else:
            _raise_unknown(cfg, key)


def _raise_unknown(cfg: DictConfig, key: str) -> None:
    known = list(_keys(cfg))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    raise ValueError(f"unknown config key {key}. Did you mean {near[0]}?")


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """All keys that can be set, with those of nested configs."""
    if not isinstance(node, DictConfig):
        return
    present = [str(name) for name in node]
    for name in [*present, *(a for a in _arguments(node) if a not in present)]:
        if name == "_target_":
            continue
        yield f"{prefix}{name}"
        if name in node and not OmegaConf.is_missing(node, name):
            yield from _keys(OmegaConf.select(node, name), f"{prefix}{name}.")


def _arguments(node: DictConfig) -> list[str]:
    """Names of the arguments of the callable that a config describes."""
    if "_target_" not in node:
        return []
    target = node["_target_"]
    target = locate(target) if isinstance(target, str) else target
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some C functions have no signature
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
