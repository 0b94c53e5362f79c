"""What is wrong with a config that its parts, each by itself, cannot tell."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..data.datasets import check_registered
from .writers import check_writers

logger = logging.getLogger(__name__)

# The least value of each.
_LEAST = (
    ("max_iter", 1),
    ("timeout_minutes", 1e-3),
    ("accumulation_steps", 1),
    ("checkpointer.period", 1),
    ("checkpointer.max_to_keep", 1),
    ("log_period", 1),
    ("eval_period", 0),
    ("dashboard.period", 1),
    ("seed", 0),
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what the user can fix into an exit with one line; its traceback goes into the log.

    Raises:
        SystemExit: for a mistake in the config, the data or the command line, and for a training
            that diverges.
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        logger.debug("stopped by:", exc_info=True)
        text = str(error).strip()
        if "Original Traceback" in text:  # in which a data worker wraps its own
            text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        raise SystemExit(f"error: {text}") from error


def check_config(cfg: DictConfig, *, training: bool) -> None:
    """Checks what no part of an experiment can check by itself.

    Args:
        cfg: whole config.
        training: whether a training follows, not only an evaluation.

    Raises:
        ValueError: class counts that differ, an unknown dataset, a number that is too small, or a
            tracker that is not installed.
    """
    check_classes(cfg)
    if not training:
        return
    for name, least in _LEAST:
        value = OmegaConf.select(cfg.train, name)
        if value is not None and value < least:
            raise ValueError(f"train.{name}={value}: needs at least {least}.")
    check_writers(cfg.train.writers)


def check_classes(cfg: DictConfig) -> None:
    """Compares the numbers of classes of datasets, decoder, losses and contrast.

    Raises:
        ValueError: they differ, or a dataset is not registered.
    """
    train_sets = cfg.dataset.train
    names = [train_sets] if isinstance(train_sets, str) else list(train_sets)
    for name in [*names, cfg.dataset.test]:
        check_registered(name)
        classes = len(MetadataCatalog.get(name).stuff_classes)
        if classes != cfg.dataset.num_classes:
            raise ValueError(
                f"dataset.num_classes={cfg.dataset.num_classes}, but {name} has {classes} classes: "
                f"set dataset.num_classes={classes}."
            )
    for key, classes in _class_counts(cfg.model, "model."):
        if classes != cfg.dataset.num_classes:
            raise ValueError(
                f"{key}={classes}, but dataset.num_classes={cfg.dataset.num_classes}: set both "
                "alike."
            )


def _class_counts(node: Any, path: str) -> Iterator[tuple[str, int]]:
    """All keys `num_classes` of a config, with their values."""
    if not OmegaConf.is_config(node) or node._is_none():
        return
    names = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for name in names:
        if OmegaConf.is_missing(node, name):
            continue
        if name == "num_classes":
            yield f"{path}{name}", node[name]  # pyright: ignore[reportArgumentType]
        elif OmegaConf.is_config(node._get_node(name)):
            yield from _class_counts(node[name], f"{path}{name}.")


def check_crop(cfg: DictConfig, model: nn.Module) -> None:
    """Compares the crops of the training with the strides of the backbone.

    Args:
        cfg: whole config.
        model: with a `backbone`.

    Raises:
        ValueError: a crop has less than a pixel on the coarsest feature map.
    """
    crop_size = OmegaConf.select(cfg, "dataloader.train.mapper.augmentations.crop_size")
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    coarsest = max(strides, key=strides.__getitem__)
    if crop_size is not None and min(crop_size) < strides[coarsest]:
        raise ValueError(
            f"crop_size={list(crop_size)}: a side is below {strides[coarsest]}, the stride of "
            f"{coarsest}, which would see padding alone. Take larger crops."
        )
