"""How well classes lie apart in a set of embeddings: pure functions on unit vectors.

Shape letters: A pixels, D embedding width, K classes, N neighbours, I images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ...contrast import class_sums, mean_similarities
from ...evaluation.metrics import confusion_matrix, segmentation_scores

# Rows whose similarities to all others are held at a time.
_CHUNK_ROWS = 1024


class Neighbours(NamedTuple):
    """The most similar pixels of other images, most similar first.

    Attributes:
        index: (A, N) int64.
        similarity: (A, N) float32, cosine.
    """

    index: np.ndarray
    similarity: np.ndarray


class PixelScores(NamedTuple):
    """Scores of predicted classes on a class-balanced set of pixels, in 0..1.

    Attributes:
        accuracy: share of the pixels that is predicted correctly.
        miou: mean intersection over union of the classes that have pixels.
    """

    accuracy: float
    miou: float


def unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """Brings rows (A, D) to length 1, in float32; a row of zeros stays one.

    Raises:
        ValueError: a value is not finite.
    """
    embeddings = np.asarray(embeddings, np.float64)
    broken = np.asarray(~np.isfinite(embeddings).all(axis=1))
    if broken.any():
        raise ValueError(
            f"{broken.sum()} of {len(broken)} embeddings are not finite: the weights are broken, "
            "or of another model."
        )
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return (embeddings / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def find_neighbours(
    embeddings: np.ndarray, image: np.ndarray, count: int, *, apart: int = 1
) -> Neighbours:
    """Finds for each pixel the most similar ones among the pixels of other images.

    Pixels of the pixel's own image do not count: they may be of the same object, and to find them
    says nothing about the class.

    Args:
        embeddings: (A, D) unit vectors.
        image: (A,) integers, number of the pixel's image.
        count: N.
        apart: least difference of the numbers of two images that may be neighbours. In a video
            larger than 1, because the next frame shows the same objects.

    Raises:
        ValueError: `count` or `apart` is below 1, or a pixel has fewer than `count` others.
    """
    for name, value in (("count", count), ("apart", apart)):
        if value < 1:
            raise ValueError(f"{name}={value}: needs 1 or more.")
    image = np.asarray(image)
    images_I, pixels_I = np.unique(image, return_counts=True)
    distance_II = np.abs(images_I[:, None] - images_I)
    fewest = int(((distance_II >= apart) @ pixels_I).min(initial=count))
    if fewest < count:
        raise ValueError(
            f"a pixel has {fewest} others in images that are {apart} or more apart, fewer than "
            f"{count} neighbours: draw from more images, or ask for fewer neighbours."
        )
    indices, similarities = [], []
    for rows, similarity in _similarity_rows(embeddings):
        similarity[np.abs(image[rows, None] - image) < apart] = -np.inf
        # Stable, so that equal similarities come in the order of the pixels.
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
        indices.append(nearest)
        similarities.append(np.take_along_axis(similarity, nearest, axis=1))
    return Neighbours(np.concatenate(indices), np.concatenate(similarities))


def neighbour_votes(neighbours: Neighbours, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The share of each pixel's neighbours that each class has, (A, K) float64."""
    votes = np.zeros((len(labels), num_classes))
    rows = np.arange(len(labels))[:, None]
    np.add.at(votes, (rows, labels[neighbours.index]), 1)
    return votes / neighbours.index.shape[1]


def knn_predictions(neighbours: Neighbours, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The class that most of a pixel's neighbours have; of several, the one whose neighbours are
    more similar in sum.

    Args:
        neighbours: of `find_neighbours`.
        labels: (A,) integers in 0..K-1.
        num_classes: K.

    Returns:
        (A,) int64.
    """
    counts = np.rint(
        neighbour_votes(neighbours, labels, num_classes) * neighbours.index.shape[1]
    ).astype(np.int64)
    sums = np.zeros(counts.shape)
    rows = np.arange(len(labels))[:, None]
    np.add.at(sums, (rows, labels[neighbours.index]), neighbours.similarity)
    tied = counts == counts.max(axis=1, keepdims=True)
    return np.where(tied, sums, -np.inf).argmax(axis=1)


def prototype_predictions(
    embeddings: np.ndarray, labels: np.ndarray, image: np.ndarray, num_classes: int
) -> np.ndarray:
    """The class whose mean is the most similar, the pixels of the own image left out of the means.

    Args:
        embeddings: (A, D) unit vectors.
        labels: (A,) integers in 0..K-1.
        image: (A,) integers.
        num_classes: K.

    Returns:
        (A,) int64, -1 where no other image has a pixel.
    """
    embeddings = embeddings.astype(np.float64)
    number = np.unique(image, return_inverse=True)[1]
    sums_IKD = np.zeros((number.max(initial=-1) + 1, num_classes, embeddings.shape[1]))
    np.add.at(sums_IKD, (number, labels), embeddings)
    counts_IK = np.zeros(sums_IKD.shape[:2])
    np.add.at(counts_IK, (number, labels), 1)
    sums_KD, counts_K = sums_IKD.sum(axis=0), counts_IK.sum(axis=0)
    predictions = np.full(len(labels), -1)
    for i in range(len(sums_IKD)):
        exists = counts_K - counts_IK[i] > 0
        if not exists.any():
            continue
        means = sums_KD - sums_IKD[i]
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        similarity = np.where(exists, embeddings[number == i] @ means.T, -np.inf)
        predictions[number == i] = similarity.argmax(axis=1)
    return predictions


def score(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> PixelScores:
    """Scores predicted classes; a prediction of -1 counts as wrong.

    Args:
        predictions: (A,) integers in -1..K-1.
        labels: (A,) integers in 0..K-1.
        num_classes: K.
    """
    # One more class takes the pixels without a prediction.
    predicted = torch.from_numpy(np.where(predictions < 0, num_classes, predictions))
    confusion = confusion_matrix(predicted, torch.from_numpy(labels), num_classes + 1, -1)
    scores = segmentation_scores(confusion, absent_classes="exclude")
    return PixelScores(scores.pacc, scores.miou)


def silhouette(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """The mean silhouette of the classes with cosine distances, -1..1; nan for less than two.

    Reference: Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of
        cluster analysis", Journal of Computational and Applied Mathematics 20, 1987.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise ImportError(
            "the silhouette needs scikit-learn: pip install 'contrast_d2[embeddings]'."
        ) from error
    if not 2 <= len(np.unique(labels)) < len(labels):
        return math.nan
    return float(silhouette_score(embeddings, labels, metric="cosine"))


def alignment(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """The mean squared distance of two pixels of one class, 0..4; lower is closer together.

    The paper's positive pairs are two views of one image; here they are all pairs of a class.

    Args:
        embeddings: (A, D) unit vectors.
        labels: (A,) integers, not negative.

    Returns:
        nan where no class has two pixels.

    Reference: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment
        and Uniformity on the Hypersphere", ICML 2020, section 4.2, with alpha = 2.
    """
    sums = class_sums(
        torch.from_numpy(embeddings).double(),
        torch.from_numpy(labels),
        int(labels.max(initial=0)) + 1,
    )
    similarity, _ = mean_similarities(sums, sums, sums.squares, sums.counts.sum())
    # |a - b|^2 = 2 - 2 a.b for unit vectors.
    return float(2 - 2 * similarity)


def uniformity(embeddings: np.ndarray, temperature: float = 2.0) -> float:
    """The logarithm of the mean Gaussian potential of two pixels; lower is more evenly spread.

    Args:
        embeddings: (A, D) unit vectors.
        temperature: t of `exp(-t |a - b|^2)`, above 0.

    Returns:
        At most 0, where all are one point; nan for less than two pixels.

    Reference: Wang and Isola, ICML 2020, section 4.2, with t = 2.
    """
    count = len(embeddings)
    if count < 2:
        return math.nan
    total = 0.0
    for rows, similarity in _similarity_rows(embeddings):
        similarity[np.arange(len(similarity)), rows] = -np.inf  # not with itself
        total += np.exp(-temperature * (2 - 2 * similarity), dtype=np.float64).sum()
    return float(np.log(total / (count * (count - 1))))


def class_similarity(embeddings: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The mean cosine similarity of two pixels, by their classes.

    Args:
        embeddings: (A, D) unit vectors.
        labels: (A,) integers in 0..K-1.
        num_classes: K.

    Returns:
        (K, K) float64, symmetric; on the diagonal two different pixels of a class; nan where there
        is no pair.
    """
    sums_KD, counts_K, _ = (
        x.numpy()
        for x in class_sums(
            torch.from_numpy(embeddings).double(), torch.from_numpy(labels), num_classes
        )
    )
    squares_K = np.bincount(
        labels, weights=np.square(embeddings, dtype=np.float64).sum(axis=1), minlength=num_classes
    )
    totals_KK = sums_KD @ sums_KD.T - np.diag(squares_K)
    pairs_KK = np.outer(counts_K, counts_K) - np.diag(counts_K)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs_KK > 0, totals_KK / pairs_KK, np.nan)


def _similarity_rows(embeddings: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of some rows and their (rows, A) cosine similarities to all, until all had a turn."""
    for start in range(0, len(embeddings), _CHUNK_ROWS):
        rows = np.arange(start, min(start + _CHUNK_ROWS, len(embeddings)))
        yield rows, embeddings[rows] @ embeddings.T
