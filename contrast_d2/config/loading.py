"""Loading an experiment file and applying the command line's overrides to it, and importing the
modules that it needs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from detectron2.config import LazyConfig
from detectron2.engine import default_argument_parser
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..evaluation.runs import load_saved_config
from ..resources import find_config
from .value_types import check_replacement, check_value_types
from .yacs import load_yacs, tree_from_yacs


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's arguments of a training program, and `--import`."""
    parser = default_argument_parser()
    # detectron2's own default is a port of the user's, on which only one job of his can run.
    parser.set_defaults(dist_url="auto")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module to import first, by name or as a .py file, for what it registers: backbones, "
        "decoders, contrast methods, datasets; may be repeated",
    )
    return parser


def import_modules(modules: Sequence[str]) -> None:
    """Imports modules for what they register. Their folders are added to the import path, so that
    data workers find them too.

    Args:
        modules: names, also of modules in the current folder, or paths of `.py` files.

    Raises:
        ValueError: there is no such module, or another one has its name.
    """
    for module in modules:
        is_file = module.endswith(".py")
        folder, name = os.path.split(os.path.abspath(module)) if is_file else (os.getcwd(), module)
        name = name.removesuffix(".py")
        if folder not in sys.path:
            sys.path.append(folder)
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # something that the module itself imports
            raise ValueError(
                f"--import {module}: there is no such module, neither installed nor here. Name a "
                "module, or a .py file."
            ) from error
        if is_file and os.path.realpath(found.__file__ or "") != os.path.realpath(module):
            raise ValueError(
                f"--import {module}: the name {name} is taken by {found.__file__}. Rename the file."
            )


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Reads a LazyConfig file, or a yaml config of detectron2 as the LazyConfig it stands for.

    Args:
        path: of a `.py` file, or of a `.yaml`: one that a run has saved, or one of detectron2,
            which has keys in upper case; `configs/...` also where the package has it.
            A `.py` file is code; a `.yaml` holds plain values, but a saved one names the callables
            that are run when its model is built.
        overrides: "key=value", in hydra's grammar; None and null both mean None. A key is one of
            the config, or an argument with a default of the callable that the config names there.
            For a yaml config of detectron2, its KEY and VALUE in turn.

    Raises:
        ValueError: no such file, a malformed override, an unknown key, or one without effect.
    """
    if not path:
        raise ValueError("--config-file is missing: name an experiment file under configs/.")
    path = find_config(path)
    if not os.path.isfile(path):
        raise ValueError(f"--config-file {path}: there is no such file.")
    for text in overrides:
        if text.startswith("--"):
            raise ValueError(f"{text}: flags go before the overrides.")
    if path.endswith((".yaml", ".yml")) and _is_yacs(path):
        return tree_from_yacs(load_yacs(path, overrides))
    cfg = _load_saved(path) if path.endswith((".yaml", ".yml")) else _load_lazy(path)
    for text in overrides:
        _apply(cfg, text)
    check_value_types(cfg)
    return cfg


def _load_saved(path: str) -> DictConfig:
    cfg = load_saved_config(path)
    missing = [name for name in ("model", "dataset", "dataloader", "train") if name not in cfg]
    if missing:
        raise ValueError(
            f"--config-file {path} has no {missing[0]}: name the config.yaml of a run, or an "
            "experiment file."
        )
    return cfg


def _load_lazy(path: str) -> DictConfig:
    """Runs an experiment file. A mistake in it keeps its traceback, which names the line."""
    if not path.endswith(".py"):
        raise ValueError(f"--config-file {path}: an experiment file ends in .py or .yaml.")
    return LazyConfig.load(path)


def _is_yacs(path: str) -> bool:
    """Whether a yaml file is a config of detectron2 (MODEL: ...), not one that a run has saved."""
    with PathManager.open(path) as file:
        try:
            root = yaml.compose(file)  # names no objects yet, and so runs no code
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"--config-file {path} is not valid yaml: {reason}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config-file {path} holds no keys.")
    return all(str(key.value).isupper() for key, _ in root.value)


def _apply(cfg: DictConfig, text: str) -> None:
    """Applies an override as detectron2 does, after a check of its key and its value."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot read the override {text!r} ({reason}): write key=value, and quote values with "
            "special characters, key='\"value\"'."
        ) from error
    if override.type is None or override.is_delete() or override.is_sweep_override():
        raise ValueError(f"the override {text!r} is not of the form key=value.")
    key, value = override.key_or_group, override.value()
    if value == "None":  # hydra's grammar knows null only
        text, value = f"{key}=null", None
    _check_key(cfg, key)
    check_replacement(key, OmegaConf.select(cfg, key, throw_on_missing=False), value)
    if isinstance(value, dict):  # takes the place of what is there, where a merge would keep that
        OmegaConf.update(cfg, key, {}, merge=False)
    LazyConfig.apply_overrides(cfg, [text])


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
