"""Label files that detectron2 and the mapper can read, from what the owners of datasets publish.

Each label file is written under another name and renamed when it is complete: a run that is stopped
at any point leaves complete files only, and the next run goes on from them.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import write_atomically
from .datasets import read_records
from .files import datasets_root

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """One label file to write."""

    split: str
    """Name of the dataset that it belongs to."""
    target: str
    """Path of the PNG."""
    make: Callable[[], np.ndarray]
    """Returns the (H, W) uint8 labels; raises ValueError where the source is not as published."""


class Plan(NamedTuple):
    """What is to be done for a dataset."""

    jobs: list[Job]
    counts: Mapping[str, tuple[int, ...]]
    """Number of images that each split has as published, by the name of the dataset; several where
    publications differ."""
    lists: Mapping[str, Sequence[str]] = {}
    """Path of each split file to its lines, written when all label files are there."""


class Summary(NamedTuple):
    """What was done."""

    written: int
    """Label files written by this run."""
    present: int
    """Label files that were there before."""
    images: dict[str, int]
    """Images with labels of each dataset that can be used."""


def run_plan(plan: Plan, *, workers: int, partial: bool = False, title: str = "") -> Summary:
    """Writes the label files that are missing, then lists the datasets and counts their images.

    Args:
        plan: of the dataset.
        workers: threads that convert, at least 1.
        partial: accept a download that lacks images or whole splits.
        title: of the progress bar, which is drawn on a terminal only.

    Returns:
        What was done.

    Raises:
        ValueError: if the download is incomplete (unless `partial`) or not as published. Files
            that were written until then are complete and stay.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if plan.jobs:
        _check_counts(Counter(job.split for job in plan.jobs), plan.counts, "label files", partial)
    missing = [job for job in plan.jobs if not _is_written(job.target)]
    for folder in {os.path.dirname(job.target) for job in missing}:
        os.makedirs(folder, exist_ok=True)
        for left in glob.glob(os.path.join(glob.escape(folder), "*.tmp")):  # by a killed process
            os.unlink(left)
    _write_all(missing, workers, title)
    for path, lines in plan.lists.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        text = "".join(f"{line}\n" for line in lines)
        write_atomically(path, lambda file, text=text: file.write(text.encode()))
    images = _count_images(plan.counts, partial)
    _check_counts(images, plan.counts, "images", partial)
    return Summary(len(missing), len(plan.jobs) - len(missing), images)


def _count_images(names: Iterable[str], partial: bool) -> dict[str, int]:
    """Number of images of each dataset as it is loaded."""
    images, failures = {}, []
    for name in names:
        try:
            images[name] = len(read_records(name))
        except ValueError as error:
            if not partial:
                raise
            failures.append(error)
            logger.warning("%s cannot be used: %s", name, error)
    if not images:
        raise failures[0]
    return images


def _check_counts(
    found: Mapping[str, int], published: Mapping[str, tuple[int, ...]], what: str, partial: bool
) -> None:
    wrong = [
        f"{name} has {found.get(name, 0):,} {what} and should have "
        + " or ".join(f"{count:,}" for count in counts)
        for name, counts in published.items()
        if found.get(name, 0) not in counts
    ]
    if not wrong:
        return
    if not partial:
        raise ValueError(
            f"{'; '.join(wrong)}: the download in {datasets_root()} is incomplete or another one. "
            "Complete it, or take it as it is with --partial"
        )
    logger.warning("%s", "; ".join(wrong))


def _write_all(jobs: Sequence[Job], workers: int, title: str) -> None:
    """Runs jobs; the first that fails cancels those that have not begun."""
    # Threads: reading, decoding and encoding images all release Python's lock.
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_write_labels, job) for job in jobs]
        try:
            done = as_completed(futures)
            # disable=None: no bar where standard error is no terminal
            for future in tqdm(done, title, len(futures), unit="file", disable=None):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_written(path: str) -> bool:
    # Other tools may have left an empty file when they were stopped.
    return os.path.isfile(path) and os.path.getsize(path) > 0


def _write_labels(job: Job) -> None:
    labels = job.make()
    write_atomically(job.target, lambda file: Image.fromarray(labels).save(file, format="PNG"))
