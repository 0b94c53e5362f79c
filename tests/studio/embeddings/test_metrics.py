"""Measures of embeddings against closed forms, double loops and scikit-learn."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from contrast_d2.studio.embeddings import metrics

ANGLES = np.radians([0, 10, 20, 90, 100, 110, 5, 95, 45])
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
LABELS = np.array([0, 0, 0, 1, 1, 1, 0, 1, 1])
IMAGE = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3])


@pytest.fixture
def points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors, labels of 4 classes and images: more than are compared at a time."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1200)
    vectors = rng.normal(size=(4, 16))[labels] + rng.normal(size=(1200, 16))
    return metrics.unit_rows(vectors), labels, rng.integers(0, 10, 1200)


def test_rows_get_length_1_and_zeros_stay() -> None:
    rows = metrics.unit_rows(np.array([[3.0, 4.0], [0, 0], [1e-30, 0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [1, 0]], atol=1e-7)
    with pytest.raises(ValueError, match="2 of 3 embeddings are not finite"):
        metrics.unit_rows(np.array([[1.0], [np.nan], [np.inf]]))


@pytest.mark.parametrize("apart", [1, 3])
def test_neighbours_are_the_most_similar_of_other_images(points, apart: int) -> None:
    vectors, _, image = points
    found = metrics.find_neighbours(vectors, image, 5, apart=apart)
    for i in (0, 7, 1100):
        others = np.flatnonzero(abs(image - image[i]) >= apart)
        similarity = vectors[others] @ vectors[i]
        best = np.sort(similarity)[::-1][:5]
        np.testing.assert_allclose(found.similarity[i], best, rtol=1e-5)
        np.testing.assert_allclose(vectors[found.index[i]] @ vectors[i], best, rtol=1e-5)
        assert set(found.index[i]) <= set(others)


def test_too_few_neighbours_are_told() -> None:
    with pytest.raises(ValueError, match="has 2 others in images that are 2 or more apart"):
        metrics.find_neighbours(CIRCLE[:8], np.array([0, 0, 1, 1, 2, 2, 3, 3]), 3, apart=2)
    with pytest.raises(ValueError, match="has 0 others"):
        metrics.find_neighbours(CIRCLE, np.zeros(9, int), 1)
    with pytest.raises(ValueError, match="count=0"):
        metrics.find_neighbours(CIRCLE, IMAGE, 0)


def test_the_majority_of_the_neighbours_decides_and_similarity_between_equals() -> None:
    labels = np.array([0, 1, 1, 2, 2])
    index = np.array([[1, 2, 3], [1, 3, 4], [3, 1, 2], [1, 2, 3], [1, 2, 3]])
    similarity = np.full((5, 3), 0.5, np.float32)
    neighbours = metrics.Neighbours(index, similarity)
    assert metrics.knn_predictions(neighbours, labels, 3).tolist() == [1, 2, 1, 1, 1]
    np.testing.assert_allclose(
        metrics.neighbour_votes(neighbours, labels, 3)[:2], [[0, 2 / 3, 1 / 3], [0, 1 / 3, 2 / 3]]
    )
    tied = metrics.Neighbours(
        np.array([[1, 2, 3, 4]]), np.array([[0.4, 0.3, 0.9, 0.1]], np.float32)
    )
    assert metrics.knn_predictions(tied, labels, 3).tolist()[0] == 2
    # Two of class 1 outvote a more similar one of class 2.
    near = metrics.Neighbours(np.array([[1, 2, 3]]), np.array([[0.1, 0.1, 0.9]], np.float32))
    assert metrics.knn_predictions(near, labels, 3).tolist()[0] == 1


def test_prototypes_leave_the_own_image_out(points) -> None:
    # Few, so that each weighs in its mean.
    vectors, labels, image = (x[:60] for x in points)
    found = metrics.prototype_predictions(vectors, labels, image, 4)
    for i in range(60):
        others = image != image[i]
        means = [vectors[others & (labels == k)].mean(axis=0) for k in range(4)]
        cosines = [m @ vectors[i] / np.linalg.norm(m) for m in means]
        assert found[i] == np.argmax(cosines)


def test_a_class_of_one_image_has_no_prototype_there() -> None:
    image = np.array([0, 0, 1])
    vectors = np.eye(3, dtype=np.float32)
    # Of image 1 there is class 1 alone, so image 0 has no other choice.
    found = metrics.prototype_predictions(vectors, np.array([0, 2, 1]), image, 3)
    assert found[:2].tolist() == [1, 1]
    assert metrics.prototype_predictions(vectors, LABELS[:3], np.zeros(3, int), 3).tolist() == [
        -1,
        -1,
        -1,
    ]


def test_scores_of_the_drawn_pixels() -> None:
    scores = metrics.score(np.array([0, 0, 1, -1]), np.array([0, 1, 1, 1]), 3)
    # Class 0: 1 of 2. Class 1: 1 of 3, a pixel without prediction being wrong. Class 2 is absent.
    assert scores == pytest.approx((0.5, (1 / 2 + 1 / 3) / 2))


def test_silhouette_of_two_far_pairs_and_of_one_class() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    assert metrics.silhouette(vectors, np.array([0, 0, 1, 1])) == pytest.approx(1)
    # Cosine distance 0 to one of the other class, and 1 to the own one.
    assert metrics.silhouette(vectors, np.array([0, 1, 0, 1])) < 0
    assert math.isnan(metrics.silhouette(vectors, np.zeros(4, int)))


def test_alignment_is_the_mean_over_pairs_of_a_class(points) -> None:
    vectors, labels, _ = (x[:60] for x in points)
    pairs = [
        ((vectors[i] - vectors[j]) ** 2).sum()
        for i in range(60)
        for j in range(60)
        if i != j and labels[i] == labels[j]
    ]
    assert metrics.alignment(vectors, labels) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert math.isnan(metrics.alignment(vectors[:2], np.array([0, 1])))


def test_uniformity_is_the_log_of_the_mean_potential(points) -> None:
    vectors = points[0]
    distances = 2 - 2 * vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    pairs = distances[~np.eye(1200, dtype=bool)]
    assert metrics.uniformity(vectors) == pytest.approx(np.log(np.exp(-2 * pairs).mean()), rel=1e-5)
    assert metrics.uniformity(vectors[[0, 0, 0]]) == pytest.approx(0, abs=1e-6)
    # Two opposite points: exp(-2 * 4).
    assert metrics.uniformity(np.array([[1, 0], [-1, 0]], np.float32)) == pytest.approx(-8)


def test_similarity_of_classes_pairs_no_pixel_with_itself() -> None:
    labels = LABELS.copy()
    labels[-1] = 3  # alone in its class
    found = metrics.class_similarity(CIRCLE, labels, 5)
    for a in range(5):
        for b in range(5):
            pairs = [
                CIRCLE[i] @ CIRCLE[j]
                for i in np.flatnonzero(labels == a)
                for j in np.flatnonzero(labels == b)
                if i != j
            ]
            expected = np.mean(pairs) if pairs else np.nan
            np.testing.assert_allclose(found[a, b], expected, atol=1e-6)


def test_knn_agrees_with_scikit_learn_image_by_image(points) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    vectors, labels, image = points
    nearest = metrics.find_neighbours(vectors, image, 7)
    predictions = metrics.knn_predictions(nearest, labels, 4)
    for number in (0, 4):
        own = image == number
        model = neighbors.KNeighborsClassifier(7, metric="cosine", algorithm="brute")
        expected = model.fit(vectors[~own], labels[~own]).predict(vectors[own])
        # It settles ties by the number of the class.
        clear = [_is_clear(labels[row]) for row in nearest.index[own]]
        assert sum(clear) > 90
        assert (predictions[own] == expected)[clear].all()


def _is_clear(votes: np.ndarray) -> bool:
    counts = [count for _, count in Counter(votes.tolist()).most_common(2)]
    return len(counts) == 1 or counts[0] > counts[1]
