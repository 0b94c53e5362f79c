"""Points of a plane: the same ones for the same seed, and near where embeddings are."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from contrast_d2.studio.embeddings import PLANES, pca_plane


@pytest.fixture
def groups() -> tuple[np.ndarray, np.ndarray]:
    """Three far groups of 20 unit vectors."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    vectors = 8 * np.eye(3, 8)[labels] + rng.normal(size=(60, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("name", ["pca", "tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_groups_stay_groups_and_seeds_decide(groups, name: str) -> None:
    if name != "pca":
        pytest.importorskip({"tsne": "openTSNE", "umap": "umap"}[name])
    vectors, labels = groups
    points = PLANES[name](vectors, 3)
    assert points.shape == (60, 2) and np.isfinite(points).all()
    np.testing.assert_array_equal(PLANES[name](vectors, 3), points)
    means = np.array([points[labels == k].mean(axis=0) for k in range(3)])
    distance = np.linalg.norm(points[:, None] - means, axis=2)
    assert (distance.argmin(axis=1) == labels).all()


def test_principal_components_are_those_of_the_covariance(groups) -> None:
    vectors, _ = groups
    points = pca_plane(vectors)
    values, axes = np.linalg.eigh(np.cov(vectors.T.astype(np.float64)))
    np.testing.assert_allclose(points.var(axis=0, ddof=1), values[::-1][:2], rtol=1e-6)
    for i, axis in enumerate(axes.T[::-1][:2]):
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        centred = vectors - vectors.mean(axis=0)
        np.testing.assert_allclose(points[:, i], centred @ axis, atol=1e-6)


def test_one_dimension_is_a_line() -> None:
    points = pca_plane(np.array([[1.0], [2.0], [6.0]]))
    np.testing.assert_allclose(points, [[-2, 0], [-1, 0], [3, 0]], atol=1e-12)


@pytest.mark.parametrize(("name", "module"), [("tsne", "openTSNE"), ("umap", "umap")])
def test_a_library_that_is_missing_is_named(
    groups, name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"contrast_d2\[embeddings\]"):
        PLANES[name](groups[0], 0)
