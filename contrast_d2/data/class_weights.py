"""Weights of classes for a loss, from how often a dataset's labels hold them.

A config says so in place of numbers:

    model.seg_loss.main.class_weights = L(class_weights)(dataset="${dataset.train}")

The label files are read once. Their counts are kept in a folder of cached files, where all
processes and later runs find them.

K: number of classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from iopath.common.file_io import file_lock

from .datasets import check_registered
from .labels import LabelMap, load_labels

logger = logging.getLogger(__name__)

Scheme = Literal["median_frequency", "inverse_log"]

# Threads are enough, since the decoder of images lets others run.
_MAX_THREADS = 8
_SECONDS_BETWEEN_REPORTS = 10.0


class ClassCounts(NamedTuple):
    """How often the labels of a dataset hold each class."""

    pixels: np.ndarray
    """(K,) int64, pixels of the class."""
    image_pixels: np.ndarray
    """(K,) int64, labelled pixels of the images that hold the class."""


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
    parts = [count_classes(name) for name in names]
    counts = ClassCounts(*(np.sum(column, axis=0) for column in zip(*parts, strict=True)))
    if not counts.pixels.any():
        raise ValueError(f"The label files of {names} hold no labelled pixel: are they void only?")
    present = counts.pixels > 0
    if not present.all():
        absent = [name for name, there in zip(classes, present, strict=True) if not there]
        logger.warning("No label of %s holds %s: weight 1", names, absent)
    weights = np.ones(len(present))
    weights[present] = _SCHEMES[scheme](ClassCounts(*(column[present] for column in counts)))
    logger.info("Class weights (%s): %s", scheme, np.round(weights, 4).tolist())
    return weights.tolist()


def _median_frequency(counts: ClassCounts) -> np.ndarray:
    frequency = counts.pixels / counts.image_pixels
    return np.median(frequency) / frequency


def _inverse_log(counts: ClassCounts) -> np.ndarray:
    return 1 / np.log(1.02 + counts.pixels / counts.pixels.sum())


_SCHEMES: dict[str, Callable[[ClassCounts], np.ndarray]] = {
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


def count_classes(dataset: str) -> ClassCounts:
    """Counts the pixels of each class in the label files of a registered dataset.

    Counts are kept in the folder that ``CONTRAST_D2_CACHE`` names (default:
    ``~/.cache/contrast_d2``) and found there by names, sizes and times of the files, and the
    dataset's label map. Of several processes that ask at once, one reads the files. Label files
    that do not lie on a local disk have no time and are read at each call.

    Args:
        dataset: its name.

    Raises:
        ValueError: an unknown name, or labels that are missing or cannot be read.
    """
    check_registered(dataset)
    label_map = LabelMap.from_metadata(MetadataCatalog.get(dataset))
    paths = []
    for record in DatasetCatalog.get(dataset):
        if "sem_seg_file_name" not in record:
            raise ValueError(
                f"{dataset} has no labels for {record.get('file_name')}: classes can be counted "
                "in a dataset with labels only, such as the training set."
            )
        paths.append(record["sem_seg_file_name"])

    key = _key(paths, label_map)
    if key is None:
        return _read_counts(paths, label_map)
    folder = os.path.expanduser(os.environ.get("CONTRAST_D2_CACHE", "~/.cache/contrast_d2"))
    path = os.path.join(folder, f"class_counts_{key}.json")
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        logger.warning("Counts of classes are not kept: %s cannot be written to", folder)
        return _read_counts(paths, label_map)
    with file_lock(path):
        counts = _load(path, label_map.num_classes)
        if counts is None:
            counts = _read_counts(paths, label_map)
            _save(path, dataset, counts)
    return counts


def _key(paths: Sequence[str], label_map: LabelMap) -> str | None:
    """What the counts depend on, as 20 hexadecimal digits; None without local files."""
    mapping = sorted(label_map.id_to_class.items()), sorted(label_map.void_ids)
    digest = hashlib.sha256(repr(mapping).encode())
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            return None
        stamp = os.path.abspath(path), status.st_size, status.st_mtime_ns
        digest.update(repr(stamp).encode())
    return digest.hexdigest()[:20]


def _read_counts(paths: Sequence[str], label_map: LabelMap) -> ClassCounts:
    """Reads all label files, several at a time."""

    def count(path: str) -> np.ndarray:
        labels = load_labels(path, label_map)
        pixels = np.bincount(labels.ravel(), minlength=256)
        return pixels[: label_map.num_classes]  # the ignored label is beyond

    logger.info("Counting the classes in %d label files of %s", len(paths), label_map.dataset_name)
    pixels, image_pixels = np.zeros((2, label_map.num_classes), dtype=np.int64)
    start = reported = time.monotonic()
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for done, in_image in enumerate(pool.map(count, paths), start=1):
            pixels += in_image
            image_pixels += np.where(in_image > 0, in_image.sum(), 0)
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                logger.info("%d of %d label files read", done, len(paths))
    logger.info("%d label files read in %.1f s", len(paths), time.monotonic() - start)
    return ClassCounts(pixels, image_pixels)


def _load(path: str, num_classes: int) -> ClassCounts | None:
    """Counts from a cached file, or None if it is not there or is no good."""
    try:
        with open(path) as file:
            content = json.load(file)
        columns = (np.array(content[name], dtype=np.int64) for name in ClassCounts._fields)
        counts = ClassCounts(*columns)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        logger.warning("The cached file %s cannot be read (%s) and is made anew", path, error)
        return None
    shapes = {column.shape for column in counts}
    if shapes != {(num_classes,)} or (counts.pixels > counts.image_pixels).any():
        logger.warning("The cached file %s makes no sense and is made anew", path)
        return None
    return counts


def _save(path: str, dataset: str, counts: ClassCounts) -> None:
    """Writes a file that is whole at any moment at which it is there."""
    content = {"dataset": dataset, **{k: v.tolist() for k, v in counts._asdict().items()}}
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w") as file:
            json.dump(content, file)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("Counts of classes are not kept: %s cannot be written (%s)", path, error)
