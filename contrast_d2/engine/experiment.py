"""Whether a run that resumes is the experiment that it began as."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# What a resumed run may change. A key that is made of one of these by interpolation, as the length
# of a schedule is of `train.max_iter`, follows it.
_FREE = (
    *("train.max_iter", "train.output_dir", "train.resume_changes"),
    # What it started from is not read again.
    *("train.init_checkpoint", "train.allow_pickle", "*.pretrained", "*.weights_file"),
    # When something is written or measured.
    *("train.checkpointer.*", "train.eval_period", "train.log_period", "train.dashboard*"),
    *("train.writers", "dataloader.evaluator.output_dir", "dataloader.evaluator.save_predictions"),
    # Where it runs.
    *("train.device", "train.timeout_minutes", "train.cudnn_benchmark", "train.deterministic"),
    *("train.ddp.find_unused_parameters", "dataloader.*.num_workers"),
    # The same of yaml configs of detectron2, which are part of their models; others of their keys
    # are compared as what they set.
    *("*.cfg.output_dir", "*.cfg.solver.max_iter", "*.cfg.solver.checkpoint_period"),
    *("*.cfg.test.eval_period", "*.cfg.train.*", "*.cfg.dataloader.num_workers"),
    *("*.cfg.model.weights", "*.cfg.model.device"),
)
# Of which the state of a training is made.
_NEVER = ("optimizer._target_", "train.seed")


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """All values of a config by their whole keys, resolved, for a checkpoint.

    Args:
        cfg: whole config. What cannot be resolved yet stays as it is written.

    Returns:
        Plain values, lists of them, and names of callables.
    """
    return dict(_leaves(cfg, ""))


def check_same_experiment(cfg: DictConfig, checkpoint: str) -> None:
    """Compares a config with the one that a checkpoint was written with.

    The main process compares, and all processes get its answer: all of them have to ask.

    Args:
        cfg: whole config; keys in its `train.resume_changes`, or below them, may differ.
        checkpoint: path of a whole one of a training.

    Raises:
        ValueError: they differ in more than a resumed run may change, a line for each key; or the
            checkpoint holds no config.
    """
    problem = _difference(cfg, checkpoint) if comm.is_main_process() else ""
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ValueError(problem)


def _difference(cfg: DictConfig, checkpoint: str) -> str:
    """What is to be said of the differences; "" if there are none."""
    # Not read into memory; its checksums have been verified.
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    before = content.get("config")
    if before is None:
        return (
            f"{checkpoint} holds no config to resume with: it was not written by this version. "
            f"Start from its weights with train.init_checkpoint={checkpoint} and a new "
            "train.output_dir, or resume with the version that wrote it."
        )
    allowed = list(cfg.train.resume_changes)
    now = plain_config(cfg)
    for name in allowed:
        if not any(_is_at(key, name) for key in (*now, *before)):
            return f"train.resume_changes={allowed}: the config has no key {name}."
    # With what may change as it was, so that what follows from it is as it was.
    as_before = copy.deepcopy(cfg)
    for key, value in now.items():
        if key in before and before[key] != value and _may_change(key, allowed):
            OmegaConf.update(as_before, key, before[key], merge=False)
    rest = plain_config(as_before)
    keys = [
        key
        for key in sorted({*rest, *before})
        if rest.get(key) != before.get(key) and not _may_change(key, allowed)
    ]
    if not keys:
        return ""
    rows = [f"  {key}={_shown(now, key)}, was {_shown(before, key)}" for key in keys]
    if set(keys) & set(_NEVER):
        way = "Resume with what was"
    else:
        way = f"Resume with what was, or change it on purpose: train.resume_changes={keys}"
    return "\n".join(
        [
            f"--resume continues the experiment of {checkpoint}, from which this one differs:",
            *rows,
            f"{way.replace(chr(39), '')}. Or begin another run, from its weights if wanted: "
            f"train.init_checkpoint={checkpoint} and a new train.output_dir.",
        ]
    )


def _may_change(key: str, allowed: list[str]) -> bool:
    if key in _NEVER:
        return False
    free = any(fnmatchcase(key.lower(), pattern) for pattern in _FREE)
    return free or any(_is_at(key, name) for name in allowed)


def _is_at(key: str, name: str) -> bool:
    """Whether a key is of that name, or below it."""
    return key == name or key.startswith(f"{name}.")


def _shown(values: dict[str, Any], key: str) -> str:
    return f"{values[key]!r}" if key in values else "not there"


def _leaves(node: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in node:
        child = node._get_node(name)
        is_plain = OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, str(name))
        if isinstance(child, DictConfig) and not (is_plain or child._is_none()):
            if child:
                yield from _leaves(child, f"{prefix}{name}.")
                continue
        try:
            value = "???" if OmegaConf.is_missing(node, name) else node[name]
        except OmegaConfBaseException:  # made of something that is not set
            value = child._value()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _convert_target_to_string(value) if callable(value) else type(value).__name__
