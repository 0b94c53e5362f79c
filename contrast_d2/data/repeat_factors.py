"""How often training images come, so that rare classes are seen more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .class_counts import count_classes

# Images at a time, for which a table of factors is made.
_ROWS = 4096


def repeat_factors(datasets: Sequence[str], threshold: float) -> np.ndarray:
    """The repeat factor of each image of one or more registered datasets, taken together.

    With f(c) the share of images that hold a pixel of class c, after the dataset's mapping of
    label values to classes and without ignored pixels:

        r(c) = max(1, sqrt(threshold / f(c))),    r(image) = max over the classes c in it of r(c)

    Args:
        datasets: names of datasets with the same classes.
        threshold: share of images below which a class is repeated, in (0, 1].

    Returns:
        (N,) float64, 1 or more, in the order of the datasets.

    Raises:
        ValueError: a threshold out of its range, or labels that are missing or cannot be read.

    Reference: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR
        2019, appendix B.2.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"repeat_threshold={threshold}: a share of the images, in (0, 1].")
    return factors_of_counts(np.concatenate([count_classes(name) for name in datasets]), threshold)


def factors_of_counts(counts: np.ndarray, threshold: float) -> np.ndarray:
    """The repeat factors of `repeat_factors` from a table of pixels.

    Args:
        counts: (N, K) pixels of each class in each image.
        threshold: share of images below which a class is repeated, in (0, 1].

    Returns:
        (N,) float64, 1 or more.
    """
    # Not detectron2's function, which takes a dict for every class of every image: for a million
    # images that is half a minute and gigabytes.
    number = np.count_nonzero(counts, axis=0)
    # A class that no image holds is in none of the maxima.
    of_class = np.sqrt(threshold * len(counts) / np.maximum(number, 1)).clip(min=1)
    factors = np.empty(len(counts))
    for start in range(0, len(counts), _ROWS):
        block = counts[start : start + _ROWS]
        factors[start : start + _ROWS] = np.where(block > 0, of_class, 1).max(axis=1)
    return factors
