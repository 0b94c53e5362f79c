"""Weights of classes for a loss, from how often a dataset's labels hold them.

A config says so in place of numbers:

    model.seg_loss.main.class_weights = L(class_weights)(dataset="${dataset.train}")

K: number of classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from detectron2.data import MetadataCatalog

from .class_counts import count_classes
from .datasets import check_registered

logger = logging.getLogger(__name__)

Scheme = Literal["median_frequency", "inverse_log"]


def class_weights(
    dataset: str | Sequence[str], *, scheme: Scheme = "median_frequency"
) -> list[float]:
    """Computes the weight of each class from the labels of one or more registered datasets.

    With f_c a class's share of the labelled pixels of those images that hold it, and p_c its share
    of all labelled pixels:

        median_frequency: median of f over the classes / f_c; some are below 1 and some above
        inverse_log:      1 / log(1.02 + p_c); between 1.4 and 50.5

    Args:
        dataset: one or more names of datasets with the same classes.
        scheme: the formula.

    Returns:
        K weights. A class without a pixel has 1, since no pixel is weighed with it, and is named in
        a warning.

    Raises:
        ValueError: an unknown scheme or dataset, datasets of different classes, labels that are
            missing or cannot be read, or no labelled pixel.

    Reference: Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a
        Common Multi-Scale Convolutional Architecture", ICCV 2015, for median_frequency; Paszke et
        al., "ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation", 2016,
        for inverse_log.
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme={scheme!r}: choose one of {list(_SCHEMES)}.")
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    classes = _common_classes(names)
    counts = np.concatenate([count_classes(name) for name in names])
    if not counts.any():
        raise ValueError(f"The label files of {names} hold no labelled pixel: are they void only?")
    present = np.asarray(counts.any(axis=0))
    if not present.all():
        absent = [name for name, there in zip(classes, present, strict=True) if not there]
        logger.warning("No label of %s holds %s: weight 1", names, absent)
    weights = np.ones(len(present))
    weights[present] = _SCHEMES[scheme](counts[:, present])
    logger.info("Class weights (%s): %s", scheme, np.round(weights, 4).tolist())
    return weights.tolist()


def _median_frequency(counts: np.ndarray) -> np.ndarray:
    pixels_of_images = (counts > 0).T @ counts.sum(axis=1)
    frequency = counts.sum(axis=0) / pixels_of_images
    return np.median(frequency) / frequency


def _inverse_log(counts: np.ndarray) -> np.ndarray:
    return 1 / np.log(1.02 + counts.sum(axis=0) / counts.sum())


_SCHEMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "median_frequency": _median_frequency,
    "inverse_log": _inverse_log,
}


def _common_classes(names: Sequence[str]) -> list[str]:
    if not names:
        raise ValueError("dataset is an empty list: name at least one.")
    for name in names:
        check_registered(name)
    classes = [list(MetadataCatalog.get(name).stuff_classes) for name in names]
    for name, other in zip(names, classes, strict=True):
        if other != classes[0]:
            raise ValueError(
                f"{names[0]} has the classes {classes[0]}, but {name} has {other}: weights are for "
                "datasets of the same classes."
            )
    return classes[0]
