"""Embeddings as points of a plane: principal components, t-SNE and UMAP, with fixed seeds.

Shape letters: A pixels, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

_EXTRA = "pip install 'contrast_d2[embeddings]'."


def pca_plane(embeddings: np.ndarray) -> np.ndarray:
    """The first two principal components, of which each has a positive largest weight.

    Args:
        embeddings: (A, D).

    Returns:
        (A, 2) float64; zeros for components that there are not.
    """
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
    plane = centred @ axes.T
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))


def tsne_plane(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE with cosine distances, exact neighbours and a start from the principal components.

    Args:
        embeddings: (A, D), at least 5 of them.
        seed: of its random numbers.

    Returns:
        (A, 2) float64. One thread, so that sums do not depend on how many there are.

    Raises:
        ImportError: openTSNE is not installed.
    """
    try:
        from openTSNE import TSNE
    except ImportError as error:
        raise ImportError(f"t-SNE needs openTSNE: {_EXTRA}") from error
    tsne = TSNE(
        perplexity=min(30, (len(embeddings) - 1) / 3),
        metric="cosine",
        neighbors="exact",
        initialization="pca",
        random_state=seed,
        n_jobs=1,
    )
    return np.asarray(tsne.fit(embeddings), np.float64)


def umap_plane(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """UMAP with cosine distances and the library's own settings.

    Args:
        embeddings: (A, D), at least 5 of them.
        seed: of its random numbers.

    Returns:
        (A, 2) float64.

    Raises:
        ImportError: umap-learn is not installed.
    """
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError(f"UMAP needs umap-learn: {_EXTRA}") from error
    neighbours = min(15, len(embeddings) - 1)
    umap = UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1)
    with warnings.catch_warnings():
        # Of its dependencies, about their own functions.
        warnings.simplefilter("ignore")
        return np.asarray(umap.fit_transform(embeddings), np.float64)


# By name: (embeddings (A, D), seed) -> (A, 2).
PLANES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "tsne": tsne_plane,
    "umap": umap_plane,
    "pca": lambda embeddings, seed: pca_plane(embeddings),
}
PLANE_TITLES = {"tsne": "t-SNE", "umap": "UMAP", "pca": "principal components"}
