"""Pictures of predictions and of training runs: pure functions, numpy arrays and figures.

Shape letters: K classes, H W. Figures are plain matplotlib figures outside pyplot's global state;
`figure.savefig(path)` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..figures import literal_text

# Okabe and Ito's colours, which stay apart for colour-blind readers; yellow is left out because
# it vanishes on white.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
CORRECT, WRONG, IGNORED = (225, 225, 225), (213, 94, 0), (255, 255, 255)
TEXT, MUTED, GRID = "#222222", "#6b6b6b", "#e3e3e3"


def colorize(labels: np.ndarray, colors: Sequence[Sequence[int]], ignore_label: int) -> np.ndarray:
    """Paint a label map.

    Args:
        labels: (H, W) integers in 0..K-1 or `ignore_label`.
        colors: K RGB triples in 0..255.
        ignore_label: label that is painted white.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: a label has no colour.
    """
    labels = np.asarray(labels)
    unknown = np.setdiff1d(labels, [*range(len(colors)), ignore_label])
    if len(unknown):
        raise ValueError(
            f"labels {unknown.tolist()} have no colour; {len(colors)} classes have one, and "
            f"{ignore_label} is ignored"
        )
    table = np.asarray([*colors, IGNORED], dtype=np.uint8)
    return table[np.where(labels == ignore_label, len(colors), labels)]


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    colors: Sequence[Sequence[int]],
    *,
    alpha: float = 0.7,
    ignore_label: int = 255,
) -> np.ndarray:
    """Blend the colours of a label map over an image; ignored pixels show the image.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers in 0..K-1 or `ignore_label`.
        colors: K RGB triples in 0..255.
        alpha: weight of the colours in 0..1.
        ignore_label: label that is not painted.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the sizes differ, a label has no colour, or `alpha` is not in 0..1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not in 0..1")
    _check_same_size(image=image, labels=labels)
    painted = colorize(labels, colors, ignore_label)
    weight = alpha * (np.asarray(labels) != ignore_label)[..., None]
    return np.rint((1 - weight) * image + weight * painted).astype(np.uint8)


def error_map(prediction: np.ndarray, labels: np.ndarray, ignore_label: int) -> np.ndarray:
    """Paint wrong pixels vermilion, correct ones light grey and ignored ones white.

    Args:
        prediction: (H, W) integers.
        labels: (H, W) integers or `ignore_label`.
        ignore_label: label of the pixels that count neither as correct nor as wrong.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the sizes differ.
    """
    _check_same_size(prediction=prediction, labels=labels)
    table = np.array([CORRECT, WRONG, IGNORED], dtype=np.uint8)
    kind = np.where(labels == ignore_label, 2, prediction != labels)
    return table[kind.astype(np.intp)]


@literal_text()
def comparison_panel(
    image: np.ndarray,
    labels: np.ndarray,
    prediction: np.ndarray,
    *,
    colors: Sequence[Sequence[int]],
    class_names: Sequence[str],
    ignore_label: int = 255,
    title: str = "",
) -> Figure:
    """Show image, ground truth, prediction and errors side by side over a legend of the classes.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) integers in 0..K-1 or `ignore_label`.
        prediction: (H, W) integers in 0..K-1.
        colors: K RGB triples in 0..255.
        class_names: K names; the legend holds those that occur.
        ignore_label: label of the pixels that are not scored.
        title: heading over the row, for instance the image's name.

    Returns:
        A figure whose panels have at least the image's resolution.

    Raises:
        ValueError: the sizes differ, or a label has no colour.
    """
    _check_same_size(image=image, labels=labels, prediction=prediction)
    height, width = labels.shape
    scored = labels != ignore_label
    errors = "errors (no pixel is labelled)"
    if scored.any():
        errors = f"errors ({(prediction != labels)[scored].mean():.1%} of labelled pixels)"
    panels = {
        "image": image,
        "ground truth": overlay(image, labels, colors, ignore_label=ignore_label),
        "prediction": overlay(image, prediction, colors, ignore_label=ignore_label),
        errors: error_map(prediction, labels, ignore_label),
    }
    dpi = 100
    panel_width = max(width, 360) / dpi
    panel_height = panel_width * height / width
    present = [k for k in range(len(class_names)) if k in labels or k in prediction]
    handles = [_patch(colors[k], class_names[k]) for k in present]
    handles += [_patch(WRONG, "wrong"), _patch(CORRECT, "correct"), _patch(IGNORED, "ignored")]
    scale = panel_width / 3.6  # of everything that is text: large pictures are shown reduced
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(4 * panel_width / scale / (0.35 + 0.065 * longest)))
    legend_height = scale * (0.12 + 0.24 * math.ceil(len(handles) / columns))
    top = scale * (0.52 if title else 0.28)
    total = (4 * panel_width + 0.5, top + panel_height + legend_height)
    figure = Figure(figsize=total, dpi=dpi, facecolor="white")
    for i, (name, picture) in enumerate(panels.items()):
        left = (0.1 + i * (panel_width + 0.1)) / total[0]
        box = (left, legend_height / total[1], panel_width / total[0], panel_height / total[1])
        axes = figure.add_axes(box)
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        axes.set_title(name, fontsize=10 * scale, color=TEXT, pad=4 * scale)
    if title:
        x, y = 0.1 / total[0], 1 - 0.07 * scale / total[1]
        font = {"fontsize": 10 * scale, "weight": "bold", "color": TEXT}
        figure.text(x, y, title, va="top", **font)
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=9 * scale,
        labelcolor=TEXT,
        handlelength=1.2,
        handleheight=0.9,
        columnspacing=1.4,
        borderpad=0.1,
        borderaxespad=0.2,
    )
    return figure


@literal_text()
def plot_curves(
    runs: Mapping[str, Mapping[int, Mapping[str, float]]], *, smoothing: int = 9
) -> Figure:
    """Plot losses and validation mIoU of one or more runs over the iterations.

    One run shows each loss on its own; several runs are overlaid, their contrastive losses summed.

    Args:
        runs: {label: {iteration: {name: value}}}, see `evaluation.runs.read_metrics`.
        smoothing: number of log entries, odd, that the running mean of the losses spans, at most
            a tenth of all entries; 1 is off. The values themselves stay visible, faint.

    Returns:
        A figure with a panel for the segmentation loss, one for the contrastive losses and one
        for mIoU, as far as the runs have them.

    Raises:
        ValueError: there is no run, or `smoothing` is below 1.
    """
    if not runs:
        raise ValueError("there is no run to plot")
    if smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must be at least 1 log entry")
    segmentation = {label: _segmentation_losses(run) for label, run in runs.items()}
    contrastive = {label: _contrastive_losses(run) for label, run in runs.items()}
    if len(runs) > 1:
        segmentation = {k: {k: v["loss_sem_seg"]} for k, v in segmentation.items()}
        contrastive = {k: {k: _sum_series(v.values())} for k, v in contrastive.items() if any(v)}
    miou = {label: _series(run, "sem_seg/mIoU") for label, run in runs.items()}

    panels = ["segmentation loss"]
    if any(contrastive.values()):
        panels.append("contrastive losses" if len(runs) == 1 else "contrastive loss (all terms)")
    if any(map(len, miou.values())):
        panels.append("mIoU (%)")
    figure = Figure(
        figsize=(4.6 * len(panels), 4.0), dpi=120, facecolor="white", layout="constrained"
    )
    color_of = dict(zip(runs, _cycle_colors(), strict=False))
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _style(axes)
        axes.set_title(name, fontsize=10, loc="left", color=TEXT)
        axes.set_xlabel("iteration", fontsize=9, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if name.startswith("mIoU"):
            _draw_miou(axes, miou, color_of)
        else:
            lines = segmentation if name.startswith("segmentation") else contrastive
            _draw_losses(axes, lines, smoothing, color_of if len(runs) > 1 else None)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
    _legends(figure, one_run=len(runs) == 1)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)), fontsize=11, weight="bold", color=TEXT)
    return figure


@literal_text()
def plot_class_iou(runs: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plot the intersection over union of each class as bars, for one or more runs.

    Args:
        runs: {label: {"mIoU": ..., "IoU-<class>": ...}} in percent; nan marks a class that is
            absent from the ground truth.

    Returns:
        The figure; classes from top to bottom in the order of the first run.

    Raises:
        ValueError: there is no run, or the runs have different classes.
    """
    if not runs:
        raise ValueError("there is no run to plot")
    classes_of = {
        label: [name[4:] for name in scores if name.startswith("IoU-")]
        for label, scores in runs.items()
    }
    first, classes = next(iter(classes_of.items()))
    for label, others in classes_of.items():
        if others != classes:
            raise ValueError(
                f"runs of different classes cannot share a plot: {first} has {classes}, "
                f"{label} has {others}"
            )
    bar = 0.8 / len(runs)
    row_height = max(0.32, 0.17 * len(runs))
    size = (7.0, 0.8 + row_height * len(classes) + 0.2 * len(runs))
    figure = Figure(figsize=size, dpi=120, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    axes.grid(visible=False, axis="y")
    for i, ((label, scores), color) in enumerate(zip(runs.items(), _cycle_colors(), strict=False)):
        values = np.array([scores[f"IoU-{name}"] for name in classes])
        rows = np.arange(len(classes)) + (i - (len(runs) - 1) / 2) * bar
        name = f"{label}: mIoU {scores['mIoU']:.1f}"
        axes.barh(rows, np.nan_to_num(values), 0.92 * bar, color=color, label=name)
        for row, value in zip(rows, values, strict=True):
            text = "not in the ground truth" if math.isnan(value) else f"{value:.1f}"
            axes.text(np.nan_to_num(value) + 0.8, row, text, va="center", fontsize=7.5, color=MUTED)
    axes.set(yticks=range(len(classes)), xlim=(0, 108), ylim=(len(classes) - 0.5, -0.5))
    axes.set_yticklabels(classes, fontsize=9, color=TEXT)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("IoU (%)", fontsize=9, color=MUTED)
    figure.legend(
        loc="outside upper left", frameon=False, fontsize=9, labelcolor=TEXT, handlelength=1.0
    )
    return figure


def _check_same_size(**arrays: np.ndarray) -> None:
    sizes = {name: tuple(array.shape[:2]) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"sizes (height, width) differ: {sizes}; resize them to the image first")


def _patch(color: Sequence[int], name: str) -> Patch:
    return Patch(
        facecolor=tuple(np.asarray(color) / 255), edgecolor="#9a9a9a", linewidth=0.6, label=name
    )


def _cycle_colors() -> Iterable[str]:
    while True:
        yield from LINE_COLORS


def _style(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5b5b5")
    axes.tick_params(labelsize=8, colors=MUTED)


def _series(run: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
    return {i: values[name] for i, values in run.items() if name in values}


def _segmentation_losses(run: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Give loss_sem_seg first, then the other terms that are not contrastive, then the total."""
    names = {name for values in run.values() for name in values if name.startswith("loss_")}
    names = {name for name in names if not name.startswith("loss_contrast")} - {"loss_sem_seg"}
    terms = {name: _series(run, name) for name in ("loss_sem_seg", *sorted(names), "total_loss")}
    # The baseline's total is its only term: one line, not two on top of each other.
    if terms["total_loss"] == terms["loss_sem_seg"]:
        del terms["total_loss"]
    return terms


def _contrastive_losses(run: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    names = {name for values in run.values() for name in values}
    names = {name for name in names if name.startswith("loss_contrast")}
    # Single scales before pairs of scales: res2, res3, then res2_res3.
    return {n: _series(run, n) for n in sorted(names, key=lambda n: (n.count("_"), n))}


def _sum_series(terms: Iterable[dict[int, float]]) -> dict[int, float]:
    total: dict[int, float] = {}
    for term in terms:
        for iteration, value in term.items():
            total[iteration] = total.get(iteration, 0.0) + value
    return total


def _draw_losses(
    axes: Axes,
    lines: Mapping[str, Mapping[str, dict[int, float]]],
    smoothing: int,
    color_of: Mapping[str, str] | None,
) -> None:
    colors = iter(_cycle_colors())
    for label, terms in lines.items():
        for name, series in terms.items():
            color = next(colors) if color_of is None else color_of[label]
            iterations, values = list(series), np.array(list(series.values()))
            window = min(smoothing, len(values) // 10)
            if window > 1:
                axes.plot(iterations, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(
                iterations, _running_mean(values, window), color=color, linewidth=1.6, label=name
            )


def _draw_miou(
    axes: Axes, miou: Mapping[str, dict[int, float]], color_of: Mapping[str, str]
) -> None:
    for label, series in miou.items():
        points = list(series), list(series.values())
        axes.plot(*points, "o-", color=color_of[label], linewidth=1.6, markersize=4, label=label)
    if len(miou) == 1:
        iteration, value = list(series.items())[-1]
        place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{value:.1f}", (iteration, value), **place, fontsize=9, color=TEXT)


def _legends(figure: Figure, *, one_run: bool) -> None:
    """Put legends below the panels, where they hide no line."""
    font = {"frameon": False, "fontsize": 8.5, "labelcolor": TEXT}
    if not one_run:
        # Every panel draws the runs in the same colours; the first has them all.
        handles, labels = figure.axes[0].get_legend_handles_labels()
        columns = min(len(labels), 4)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, **font)
        return
    for axes in figure.axes:
        lines = axes.get_legend_handles_labels()[1]
        if len(lines) > 1:
            columns = 2 if len(lines) > 3 else len(lines)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, **font)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Average each value with its neighbours, fewer of them at both ends."""
    reach = window // 2
    # Sums over windows, not differences of a running sum: a loss that is not finite would spoil
    # all that follows it.
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return np.array([part.mean() for part in windows])
