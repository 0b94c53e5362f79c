"""All that is measured of one model's embeddings of a set of pixels.

Shape letters: A pixels, D embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from . import metrics
from .planes import PLANES


class ModelStudy(NamedTuple):
    """What `study_model` finds.

    Attributes:
        scores: by name: `knn_accuracy`, `knn_miou`, `prototype_accuracy`, `prototype_miou` and
            `prediction_accuracy`, `prediction_miou` of the model's own classes, all in 0..1 on the
            drawn pixels; `silhouette`, `alignment`, `uniformity`.
        class_similarity: (K, K), mean cosine similarity of two pixels by their classes.
        votes: (A, K), the share of each pixel's neighbours that each class has.
        neighbour_class: (A,) int64, the class that most neighbours have.
        planes: (A, 2) by name, the pixels as points.
    """

    scores: dict[str, float]
    class_similarity: np.ndarray
    votes: np.ndarray
    neighbour_class: np.ndarray
    planes: dict[str, np.ndarray]


def check_libraries(planes: Sequence[str]) -> None:
    """Looks for the libraries that a study with these planes needs, before any work is done.

    Raises:
        ImportError: one of them is not installed.
    """
    needed = {"sklearn": "scikit-learn"}
    needed |= {"openTSNE": "openTSNE"} if "tsne" in planes else {}
    needed |= {"umap": "umap-learn"} if "umap" in planes else {}
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} missing: pip install 'contrast_d2[embeddings]'."
        )


def study_model(
    embeddings: np.ndarray,
    predictions: np.ndarray,
    labels: np.ndarray,
    image: np.ndarray,
    *,
    num_classes: int,
    neighbours: int,
    apart: int,
    planes: Sequence[str],
    seed: int,
) -> ModelStudy:
    """Measures embeddings, after bringing them to length 1.

    Args:
        embeddings: (A, D).
        predictions: (A,) integers in 0..K-1, the model's own.
        labels: (A,) integers in 0..K-1.
        image: (A,) integers, number of the pixel's image.
        num_classes: K.
        neighbours: how many vote.
        apart: as in `find_neighbours`.
        planes: names in `PLANES`.
        seed: of the planes.

    Raises:
        ValueError: embeddings that are not finite, too few pixels for so many neighbours.
        ImportError: a library of the extra `embeddings` is missing.
    """
    units = metrics.unit_rows(embeddings)
    nearest = metrics.find_neighbours(units, image, neighbours, apart=apart)
    neighbour_class = metrics.knn_predictions(nearest, labels, num_classes)
    classes = {
        "knn": neighbour_class,
        "prototype": metrics.prototype_predictions(units, labels, image, num_classes),
        "prediction": predictions,
    }
    scores = {}
    for name, found in classes.items():
        scored = metrics.score(found, labels, num_classes)
        scores[f"{name}_accuracy"], scores[f"{name}_miou"] = scored
    scores["silhouette"] = metrics.silhouette(units, labels)
    scores["alignment"] = metrics.alignment(units, labels)
    scores["uniformity"] = metrics.uniformity(units)
    return ModelStudy(
        scores=scores,
        class_similarity=metrics.class_similarity(units, labels, num_classes),
        votes=metrics.neighbour_votes(nearest, labels, num_classes),
        neighbour_class=neighbour_class,
        planes={name: PLANES[name](units, seed) for name in planes},
    )
