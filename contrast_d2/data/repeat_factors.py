"""How often training images come, so that rare classes are seen more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data.samplers import RepeatFactorTrainingSampler

from .class_counts import count_classes


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
    counts = np.concatenate([count_classes(name) for name in datasets])
    # As detectron2 wants them: an "annotation" for each class in the image.
    images = [
        {"annotations": [{"category_id": int(c)} for c in np.flatnonzero(row)]} for row in counts
    ]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(images, threshold)
    return factors.double().numpy()
