"""How many pixels of each class the labels of a dataset hold, image by image.

The label files are read once. Their counts are kept in a folder of cached files, where all
processes and later runs find them.

N: number of images. K: number of classes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from detectron2.data import MetadataCatalog
from iopath.common.file_io import file_lock

from ..files import write_atomically
from .datasets import read_records
from .labels import LabelMap, load_labels

logger = logging.getLogger(__name__)

# Threads are enough, since the decoder of images lets others run.
_MAX_THREADS = 8
# Files that wait for a thread at a time; each that waits takes kilobytes.
_QUEUED = 4096
_SECONDS_BETWEEN_REPORTS = 10.0


def count_classes(dataset: str) -> np.ndarray:
    """Counts the pixels of each class in each label file of a registered dataset.

    Counts are kept in the folder that ``CONTRAST_D2_CACHE`` names (default:
    ``~/.cache/contrast_d2``) and found there by names, sizes and times of the files, and the
    dataset's label map. Of several processes that ask at once, one reads the files. Label files
    that do not lie on a local disk have no time and are read at each call.

    Args:
        dataset: its name.

    Returns:
        (N, K) int64, in the order of the dataset. Ignored pixels are of no class.

    Raises:
        ValueError: an unknown name, or labels that are missing or cannot be read.
    """
    label_map = LabelMap.from_metadata(MetadataCatalog.get(dataset))
    paths = []
    for record in read_records(dataset):
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
    path = os.path.join(folder, f"class_counts_{key}.npz")
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        logger.warning("Counts of classes are not kept: %s cannot be written to", folder)
        return _read_counts(paths, label_map)
    with file_lock(path):
        counts = _load(path, (len(paths), label_map.num_classes))
        if counts is None:
            counts = _read_counts(paths, label_map)
            _save(path, counts)
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


def _read_counts(paths: Sequence[str], label_map: LabelMap) -> np.ndarray:
    """Reads all label files, several at a time."""

    def count(path: str) -> np.ndarray:
        labels = load_labels(path, label_map)
        pixels = np.bincount(labels.ravel(), minlength=256)
        return pixels[: label_map.num_classes]  # the ignored label is beyond

    logger.info("Counting the classes in %d label files of %s", len(paths), label_map.dataset_name)
    counts = np.empty((len(paths), label_map.num_classes), dtype=np.int64)
    start = reported = time.monotonic()
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        parts = (paths[i : i + _QUEUED] for i in range(0, len(paths), _QUEUED))
        found = itertools.chain.from_iterable(pool.map(count, part) for part in parts)
        for index, in_image in enumerate(found):
            counts[index] = in_image
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                logger.info("%d of %d label files read", index + 1, len(paths))
    logger.info("%d label files read in %.1f s", len(paths), time.monotonic() - start)
    return counts


def _load(path: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Counts from a cached file, or None if it is not there or is no good."""
    try:
        with np.load(path, allow_pickle=False) as content:
            counts = content["counts"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        logger.warning("The cached file %s cannot be read (%s) and is made anew", path, error)
        return None
    if counts.shape != shape or counts.dtype != np.int64 or (counts < 0).any():
        logger.warning("The cached file %s makes no sense and is made anew", path)
        return None
    return counts


def _save(path: str, counts: np.ndarray) -> None:
    try:
        write_atomically(path, lambda file: np.savez_compressed(file, counts=counts))
    except OSError as error:
        logger.warning("Counts of classes are not kept: %s cannot be written (%s)", path, error)
