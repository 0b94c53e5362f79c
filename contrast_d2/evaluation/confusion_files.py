"""A confusion matrix as a table and as a picture."""

from __future__ import annotations

import csv
import gc
from collections.abc import Sequence

import numpy as np
from detectron2.utils.file_io import PathManager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..figures import literal_text

# With more classes, numbers in the cells could not be read, nor could names of 6 points.
_MOST_WITH_NUMBERS, _MOST_WITH_LARGE_NAMES = 25, 60


def write_confusion_csv(confusion: Tensor, class_names: Sequence[str], path: str) -> None:
    """Writes the pixels of every pair of classes as a table.

    Args:
        confusion: (K, K) integers; rows are true classes, columns are predicted classes.
        class_names: K names, for the first row and column.
        path: of the file, opened through detectron2's PathManager.
    """
    with PathManager.open(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["true \\ predicted", *class_names])
        for name, row in zip(class_names, confusion.tolist(), strict=True):
            writer.writerow([name, *row])


@literal_text()
def plot_confusion(confusion: Tensor, class_names: Sequence[str]) -> Figure:
    """Draws what becomes of the pixels of each class, in percent of them.

    Args:
        confusion: (K, K) integers; rows are true classes, columns are predicted classes.
        class_names: K names.

    Returns:
        A figure that grows with K; rows of classes without pixels are empty. Numbers are in the
        cells of 25 classes or fewer.
    """
    matrix_KK = confusion.numpy().astype(np.float64)
    labelled = matrix_KK.sum(axis=1, keepdims=True)
    percent = np.full_like(matrix_KK, np.nan)
    np.divide(100 * matrix_KK, labelled, out=percent, where=labelled > 0)

    num_classes = len(class_names)
    with_numbers = num_classes <= _MOST_WITH_NUMBERS
    side = 2.5 + num_classes * (0.38 if with_numbers else 0.12)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    size = 8 if with_numbers else 6 if num_classes <= _MOST_WITH_LARGE_NAMES else 4
    axes.set_xticks(range(num_classes), class_names, rotation=90, fontsize=size)
    axes.set_yticks(range(num_classes), class_names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, ax=axes, label="pixels of the true class (%)", shrink=0.7)
    if with_numbers:
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                color = "white" if value > 60 else "black"
                axes.text(
                    column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color
                )
    return figure


@literal_text()
def write_confusion_picture(confusion: Tensor, class_names: Sequence[str], path: str) -> None:
    """Writes `plot_confusion` as a PNG file, opened through detectron2's PathManager."""
    with PathManager.open(path, "wb") as file:
        plot_confusion(confusion, class_names).savefig(file, format="png", dpi=150)
    # A figure is a knot of cycles and holds some MiB; Python would look for it after many more.
    gc.collect()
