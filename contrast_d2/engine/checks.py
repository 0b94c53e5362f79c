"""What is wrong with a config that its parts, each by itself, cannot tell."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.datasets import check_registered, read_records
from ..data.labels import LabelMap, load_labels
from ..registries import did_you_mean
from .writers import check_writers

logger = logging.getLogger(__name__)

# The least value of each, and the largest of some: what torch's generators and timers hold.
_RANGES = (
    ("max_iter", 1, math.inf),
    ("timeout_minutes", 1e-3, 525_600),
    ("accumulation_steps", 1, math.inf),
    ("checkpointer.period", 1, math.inf),
    ("checkpointer.max_to_keep", 1, math.inf),
    ("log_period", 1, math.inf),
    ("eval_period", 0, math.inf),
    ("dashboard.period", 1, math.inf),
    ("seed", 0, 2**64 - 1),
)
# So many label files of each dataset are looked at before a training.
_LABEL_FILES = 8


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
    check_ranges(cfg)
    check_classes(cfg)
    if training:
        check_writers(cfg.train.writers)
        changes = cfg.train.resume_changes
        if isinstance(changes, str):
            raise ValueError(
                f"train.resume_changes={changes}: give a list, train.resume_changes=[{changes}]."
            )


def check_ranges(cfg: DictConfig) -> None:
    """Checks the numbers of the training loop.

    Raises:
        ValueError: one is out of range.
    """
    for name, least, most in _RANGES:
        value = OmegaConf.select(cfg.train, name)
        if value is not None and not least <= value <= most:
            upper = "" if math.isinf(most) else f" and at most {most}"
            raise ValueError(f"train.{name}={value}: needs at least {least}{upper}.")


def check_labels(cfg: DictConfig) -> None:
    """Reads some label files of the training and the test set, spread over each.

    Raises:
        ValueError: one cannot be read or holds a value that is no label, or all pixels are void.
    """
    train_sets = cfg.dataset.train
    for name in [*([train_sets] if isinstance(train_sets, str) else train_sets), cfg.dataset.test]:
        records = [x for x in read_records(name) if "sem_seg_file_name" in x]
        if not records:
            continue
        label_map = LabelMap.from_metadata(MetadataCatalog.get(name))
        shown = records[:: -(-len(records) // _LABEL_FILES)]
        labels = [load_labels(x["sem_seg_file_name"], label_map) for x in shown]
        if all((x == label_map.ignore_label).all() for x in labels):
            raise ValueError(
                f"{name}: every pixel of {len(labels)} label files is void, such as of "
                f"{shown[0]['sem_seg_file_name']}, so there is nothing to learn or to measure: "
                "correct the files, or the values that the dataset takes for its classes."
            )


def check_best_metric(metric: str, evaluator: Any) -> None:
    """Compares the metric that the best weights are chosen by with those of the evaluation.

    Args:
        metric: `train.best_metric`.
        evaluator: an evaluator, whose `score_names` are compared if it has and knows them.

    Raises:
        ValueError: there is no such metric.
    """
    names = getattr(evaluator, "score_names", None)
    known = {f"sem_seg/{name}" for name in names or ()}
    if known and metric not in known:
        raise ValueError(f"train.best_metric={metric}: {did_you_mean(metric, known)}")


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
        ValueError: a crop has less than a pixel on the coarsest feature map, or a whole batch has
            one there, under batch norm.
    """
    crop_size = OmegaConf.select(cfg, "dataloader.train.mapper.augmentations.crop_size")
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    coarsest = max(strides, key=strides.__getitem__)
    if crop_size is not None and min(crop_size) < strides[coarsest]:
        raise ValueError(
            f"crop_size={list(crop_size)}: a side is below {strides[coarsest]}, the stride of "
            f"{coarsest}, which would see padding alone. Take larger crops."
        )
    total = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    batch = (total or 0) // (cfg.train.accumulation_steps * comm.get_world_size())
    has_norm = any(isinstance(x, _BatchNorm) for x in model.modules())
    if crop_size is not None and max(crop_size) <= strides[coarsest] and batch == 1 and has_norm:
        raise ValueError(
            f"dataloader.train.total_batch_size={total} with crop_size={list(crop_size)}: a batch "
            f"is one image, of which {coarsest} has one pixel, and batch norm has no statistics of "
            "one value. Take larger batches or crops."
        )
