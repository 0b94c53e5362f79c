"""What is wrong with a config that its parts, each by itself, cannot tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..data.datasets import check_registered
from .writers import check_writers

# The least value of each.
_LEAST = (
    ("max_iter", 1),
    ("accumulation_steps", 1),
    ("checkpoint_period", 1),
    ("log_period", 1),
    ("eval_period", 0),
)


def check_training(options: DictConfig) -> None:
    """Checks the settings of the training loop that its parts take unseen.

    Args:
        options: `train` of a config.

    Raises:
        ValueError: a period, or a number of checkpoints, that is none, or writers that cannot be
            had.
    """
    for name, least in _LEAST:
        if options[name] < least:
            raise ValueError(f"train.{name}={options[name]}: needs at least {least}.")
    if options.get("dashboard_period", 0) < 0:  # which configs saved by earlier versions lack
        raise ValueError(
            f"train.dashboard_period={options.dashboard_period}: needs 0 (none) or more iterations."
        )
    check_writers(options.get("writers", []))
    keep = options.checkpoints_to_keep
    if keep is not None and keep < 1:
        raise ValueError(f"train.checkpoints_to_keep={keep}: needs at least 1, or None for all.")


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


def check_crop(crop_size: Sequence[int] | None, model: nn.Module) -> None:
    """Compares the crops of the training with the strides of the backbone.

    Args:
        crop_size: (height, width); None where there are no crops.
        model: with a `backbone`.

    Raises:
        ValueError: a crop has less than a pixel on the coarsest feature map.
    """
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    coarsest = max(strides, key=strides.__getitem__)
    if crop_size is not None and min(crop_size) < strides[coarsest]:
        raise ValueError(
            f"crop_size={list(crop_size)}: a side is below {strides[coarsest]}, the stride of "
            f"{coarsest}, which would see padding alone. Take larger crops."
        )
