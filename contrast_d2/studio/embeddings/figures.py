"""Pictures of embeddings: points of a plane and the similarity of classes, model beside model.

Shape letters: A pixels, K classes. Figures are plain matplotlib figures outside pyplot's state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ...figures import literal_text
from ..visualize import MUTED, TEXT

# Up to so many classes the cells of a similarity matrix hold numbers.
_MOST_NUMBERED = 24


@literal_text()
def plot_planes(
    planes: Mapping[str, np.ndarray],
    labels: np.ndarray,
    colors: Sequence[Sequence[int]],
    class_names: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Draws the pixels of each model as points in the colours of their classes.

    Args:
        planes: (A, 2) by model. Axes have no unit, and are not those of another model.
        labels: (A,) integers in 0..K-1.
        colors: K RGB triples in 0..255.
        class_names: K names; the legend holds those that occur, with their number of pixels.
        title: heading.
    """
    size = 4.6
    present = np.unique(labels)
    entries = [f"{class_names[k]} ({(labels == k).sum()})" for k in present]
    columns = max(1, int(size * len(planes) / (0.4 + 0.075 * max(map(len, entries)))))
    rows = -(-len(present) // columns)
    height = size + 0.5 + 0.24 * rows
    figure = Figure(
        figsize=(size * len(planes), height), dpi=120, facecolor="white", layout="constrained"
    )
    # The last class must not lie on top of all others.
    order = np.random.default_rng(0).permutation(len(labels))
    shades = np.asarray(colors)[labels[order]] / 255
    for axes, (model, plane) in zip(
        figure.subplots(1, len(planes), squeeze=False)[0], planes.items(), strict=True
    ):
        axes.scatter(*plane[order].T, c=shades, s=7, linewidths=0.15, edgecolors=MUTED)
        axes.set_title(model, fontsize=10, color=TEXT)
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.spines[:].set_color("#b5b5b5")
    handles = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            markersize=6,
            markeredgecolor=MUTED,
            markeredgewidth=0.3,
            markerfacecolor=tuple(np.asarray(colors[k]) / 255),
            label=entry,
        )
        for k, entry in zip(present, entries, strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=TEXT,
        handletextpad=0.1,
    )
    if title:
        figure.suptitle(title, fontsize=11, weight="bold", color=TEXT)
    return figure


@literal_text()
def plot_class_similarity(
    similarity: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> Figure:
    """Draws the mean cosine similarity of the classes of each model, on one scale for all.

    Args:
        similarity: (K, K) by model, nan where there is no pair.
        class_names: K names.
    """
    count = len(class_names)
    size = max(3.2, 0.42 * min(count, _MOST_NUMBERED) + 1.6)
    figure = Figure(
        figsize=(size * len(similarity) + 0.8, size),
        dpi=120,
        facecolor="white",
        layout="constrained",
    )
    panels = figure.subplots(1, len(similarity), squeeze=False)[0]
    # Features behind a ReLU are all similar: a scale from -1 would show one colour.
    values = np.concatenate([matrix.ravel() for matrix in similarity.values()])
    low, high = np.nanmin(values), np.nanmax(values)
    font = 8 if count <= _MOST_NUMBERED else 4
    for axes, (model, matrix) in zip(panels, similarity.items(), strict=True):
        picture = axes.imshow(matrix, vmin=low, vmax=high, cmap="viridis")
        axes.set_title(model, fontsize=10, color=TEXT)
        axes.set_xticks(range(count), class_names, rotation=90, fontsize=font, color=TEXT)
        axes.set_yticks(range(count), class_names, fontsize=font, color=TEXT)
        axes.tick_params(length=0)
        for (row, column), value in np.ndenumerate(matrix if count <= _MOST_NUMBERED else []):
            if np.isfinite(value):
                shade = TEXT if value > (low + high) / 2 else "white"
                text = f"{value:.2f}".replace("0.", ".")
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=shade)
    bar = figure.colorbar(picture, ax=list(panels), shrink=0.7)
    bar.set_label("mean cosine similarity", fontsize=8, color=MUTED)
    bar.ax.tick_params(labelsize=7, colors=MUTED)
    return figure
