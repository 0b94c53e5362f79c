"""Pictures of what a contrast method did in one training step.

Shape letters: B images, K classes, H W the padded size of a batch, N drawn pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..contrast import DrawnPixels, Inspection
from ..figures import literal_text
from .compositing import Entry, panels, text_size_for, with_legend
from .visualize import GRID, LINE_COLORS, MUTED, TEXT

# Colours of Okabe and Ito, and whether a pixel is marked by a frame rather than a filled square.
# What comes later is painted over what comes before.
_STYLES = {
    "boundary negatives": ((240, 228, 66), True),
    "samples": ((0, 158, 115), False),
    "anchors": ((86, 180, 233), False),
    "hard anchors": ((213, 94, 0), False),
}
CONTOUR, _RIM = (255, 255, 255), (0, 0, 0)
# Of the image's light and colours, so much is left under marks and contours.
_LIGHT, _COLOR = 0.8, 0.4
# The shorter side of an image is enlarged to about so many pixels, and the longer reduced to them.
_SMALLEST, _LARGEST = 480, 1024
# More classes than that are not named on the axes of a matrix, and more are not written into it.
_NAMED, _WRITTEN = 40, 12


def draws_picture(
    images: Sequence[np.ndarray],
    names: Sequence[str],
    labels: Tensor,
    draws: Mapping[str, DrawnPixels],
    *,
    num_classes: int,
) -> np.ndarray:
    """Shows on images which pixels of one feature map were drawn, and for what.

    A mark is where the pixel of the map reads its class in the labels. Filled squares are anchors,
    by whether the network predicts their class, and samples that serve as positives and negatives;
    frames are boundary negatives. Boundaries of the classes are thin lines. The legend has the
    numbers of pixels on the images that are shown.

    Args:
        images: (h, w, 3) uint8, RGB, the first ones of the batch.
        names: what they are called.
        labels: (B, H, W) of the batch, padded at the right and below; others than 0..K-1 ignored.
        draws: of one scale of an `Inspection`.
        num_classes: K.

    Returns:
        (height, width, 3) uint8, RGB: a panel for each image, over a legend.
    """
    height, width = labels.shape[-2:]
    zoom = min(
        max(1, round(_SMALLEST / min(height, width))), max(1, _LARGEST // max(height, width))
    )
    step = max(1, math.ceil(max(height, width) / _LARGEST))
    side = max(5, round(min(height, width) * zoom / step / 75)) | 1
    parts = {k: x for role, draw in draws.items() for k, x in by_outcome(role, draw).items()}
    parts = {name: _on_host(parts[name]) for name in _STYLES if name in parts}
    counts = dict.fromkeys(parts, 0)
    pictures: dict[str, np.ndarray] = {}
    for number, (image, title) in enumerate(zip(images, names, strict=True)):
        canvas = _darkened(image, labels[number].cpu().numpy(), num_classes, zoom, step)
        for name, (index, *where) in parts.items():
            places = np.stack(where, axis=1)[index == number] * zoom // step + zoom // 2
            color, hollow = _STYLES[name]
            paint_squares(canvas, places, side + 4 if hollow else side, color, hollow=hollow)
            counts[name] += len(places)
        pictures[f"{number}: {title}"] = canvas
    text = text_size_for(*next(iter(pictures.values())).shape[:2])
    picture = panels(pictures, text_size=text, columns=2 if width < 2 * height else 1)
    entries = [
        Entry(f"{count} {name}", _STYLES[name][0], 1, is_box=_STYLES[name][1])
        for name, count in counts.items()
        if count
    ]
    entries.append(Entry("boundary of classes", CONTOUR, 1))
    return with_legend(picture, entries, text_size=text)


def by_outcome(role: str, draw: DrawnPixels) -> dict[str, DrawnPixels]:
    """The pixels of a draw by name: anchors apart from hard ones, which are wrongly predicted."""
    if role != "anchors" or draw.wrong is None:
        return {role: draw}
    parts = {"anchors": ~draw.wrong, "hard anchors": draw.wrong}
    return {name: DrawnPixels(*(x[part] for x in draw)) for name, part in parts.items()}  # pyright: ignore[reportOptionalSubscript]


def _on_host(draw: DrawnPixels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, row and column."""
    return draw.image.cpu().numpy(), draw.row.cpu().numpy(), draw.column.cpu().numpy()


def _darkened(
    image: np.ndarray, labels: np.ndarray, num_classes: int, zoom: int, step: int
) -> np.ndarray:
    """The image as a ground for marks, with thin contours, padded to the size of the labels."""
    labels = np.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    labels = labels.repeat(zoom, axis=0).repeat(zoom, axis=1)[::step, ::step]
    edge = np.zeros(labels.shape, dtype=bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    canvas = np.zeros((*labels.shape, 3), dtype=np.uint8)
    shown = image.repeat(zoom, axis=0).repeat(zoom, axis=1)[::step, ::step]
    grey = shown.mean(axis=2, keepdims=True)
    canvas[: shown.shape[0], : shown.shape[1]] = _LIGHT * (_COLOR * shown + (1 - _COLOR) * grey)
    canvas[edge] = CONTOUR
    return canvas


def paint_squares(
    canvas: np.ndarray,
    centres: np.ndarray,
    side: int,
    color: tuple[int, int, int],
    *,
    hollow: bool = False,
) -> None:
    """Paints squares with a dark rim of a pixel, in place.

    Args:
        canvas: (H, W, 3) uint8.
        centres: (N, 2) integers, row and column.
        side: of the square in pixels, odd, with the rim.
        color: RGB in 0..255.
        hollow: paint a frame of one pixel within the rim, and leave what it surrounds.
    """
    reach = side // 2
    offsets = np.stack(np.mgrid[-reach : reach + 1, -reach : reach + 1], axis=-1).reshape(-1, 2)  # pyright: ignore[reportArgumentType, reportCallIssue]
    ring = np.abs(offsets).max(axis=1)
    inner = ring == reach - 1 if hollow else ring < reach
    limits = np.array(canvas.shape[:2]) - 1
    for part, value in ((ring == reach, _RIM), (inner, color)):
        places = (centres[:, None] + offsets[part]).reshape(-1, 2).clip(0, limits)
        canvas[places[:, 0], places[:, 1]] = value


@literal_text()
def similarity_figure(inspection: Inspection, class_names: Sequence[str]) -> Figure:
    """Mean similarity of anchors and samples by their classes, one matrix for each term.

    Args:
        inspection: with similarities of at least one term.
        class_names: K names.
    """
    names, num = list(inspection.similarities), len(class_names)
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    size = 2.6 + 0.12 * min(num, _NAMED)
    figure = Figure(
        figsize=(columns * size + 0.8, rows * size),
        dpi=100,
        facecolor="white",
        layout="constrained",
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    cmap = colormaps["RdBu_r"].with_extremes(bad="#e8e8e8")
    for number, (axes, name) in enumerate(zip(grid, names, strict=False)):
        matrix = inspection.similarities[name].of_classes.cpu().numpy()
        shown = axes.imshow(matrix, cmap=cmap, vmin=-1, vmax=1)
        axes.set_title(name, fontsize=9, loc="left", color=TEXT)
        axes.tick_params(length=0, labelsize=7, labelcolor=MUTED)
        axes.spines[:].set_visible(False)
        ticks = range(num) if num <= _NAMED else []
        axes.set_xticks(ticks, class_names if len(ticks) else [], rotation=90)
        axes.set_yticks(ticks, class_names if len(ticks) and number % columns == 0 else None)
        if number % columns:
            axes.set_yticklabels([])
        if num <= _WRITTEN:
            for i, j in np.argwhere(np.isfinite(matrix)):
                ink = "white" if abs(matrix[i, j]) > 0.6 else TEXT
                text = f"{round(float(matrix[i, j]), 1) + 0.0:.1f}".replace("-", "\N{MINUS SIGN}")
                axes.text(j, i, text, ha="center", va="center", fontsize=6, color=ink)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    bar = figure.colorbar(shown, ax=list(grid), shrink=0.7, aspect=30)
    bar.set_label("mean cosine of anchors (rows) and samples (columns)", fontsize=8, color=MUTED)
    bar.ax.tick_params(labelsize=7, labelcolor=MUTED)
    return figure


def class_counts(inspection: Inspection) -> dict[str, dict[str, np.ndarray]]:
    """How many pixels of each class were drawn, {scale: {what for: (K,)}}."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for scale, draws in inspection.draws.items():
        result[scale] = {
            name: np.bincount(part.labels.cpu().numpy(), minlength=inspection.num_classes)
            for role, draw in draws.items()
            for name, part in by_outcome(role, draw).items()
        }
    for scale, counts in inspection.anchor_pixels.items():
        result.setdefault(scale, {})["pixels of the anchor"] = counts.cpu().numpy()
    return result


@literal_text()
def bars_figure(
    values: Mapping[str, Mapping[str, np.ndarray]], class_names: Sequence[str], label: str
) -> Figure:
    """Bars of a quantity by class, a panel for each group of series.

    Args:
        values: {panel: {series: (K,)}}, at least one.
        class_names: K names.
        label: of the axis of values.
    """
    num = len(class_names)
    most = max(len(series) for series in values.values())
    row = 0.15 + 0.09 * most if num <= _NAMED else 0.06
    figure = Figure(
        figsize=(1.2 + 2.6 * len(values), 1.0 + row * num),
        dpi=100,
        facecolor="white",
        layout="constrained",
    )
    all_axes = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
    for axes, (panel, series) in zip(all_axes, values.items(), strict=True):
        bar = 0.8 / len(series)
        for i, (name, heights) in enumerate(series.items()):
            color = LINE_COLORS[i % len(LINE_COLORS)]
            if name in _STYLES:
                color = np.array(_STYLES[name][0]) / 255
            places = np.arange(num) + (i - (len(series) - 1) / 2) * bar
            axes.barh(places, heights, 0.92 * bar, color=color, label=name)
        axes.set_title(panel, fontsize=9, loc="left", color=TEXT)
        axes.set_xlabel(label, fontsize=8, color=MUTED)
        axes.grid(color=GRID, linewidth=0.8, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=7, colors=MUTED, length=0)
        axes.set_ylim(num - 0.5, -0.5)
    all_axes[0].set_yticks(range(num) if num <= _NAMED else [])
    if num <= _NAMED:
        all_axes[0].set_yticklabels(class_names)
    handles = {
        name: handle
        for axes in all_axes
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper left",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        labelcolor=TEXT,
    )
    return figure


@literal_text()
def figure_pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8, RGB: a figure as it is written to a file."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
