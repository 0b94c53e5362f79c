from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from contrast_d2.studio.visualize import (
    CORRECT,
    IGNORED,
    WRONG,
    colorize,
    comparison_panel,
    error_map,
    overlay,
    plot_class_iou,
    plot_curves,
)

COLORS = [(255, 0, 0), (0, 200, 0)]
LABELS = np.array([[0, 1, 255]], dtype=np.uint8)
IMAGE = np.full((1, 3, 3), 100, dtype=np.uint8)


def pixels(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def test_colorize_looks_colours_up_and_names_labels_without_one():
    assert colorize(LABELS, COLORS, 255).tolist() == [[[255, 0, 0], [0, 200, 0], [255, 255, 255]]]
    with pytest.raises(ValueError, match=r"labels \[2, 9\] have no colour; 2 classes"):
        colorize(np.array([[0, 2, 9]]), COLORS, 255)


def test_overlay_blends_and_shows_the_image_where_labels_are_ignored():
    blended = overlay(IMAGE, LABELS, COLORS, alpha=0.25)
    assert blended.dtype == np.uint8
    assert blended.tolist() == [[[139, 75, 75], [75, 125, 75], [100, 100, 100]]]
    assert overlay(IMAGE, LABELS, COLORS, alpha=0).tolist() == IMAGE.tolist()


def test_overlay_refuses_other_sizes_and_weights():
    with pytest.raises(ValueError, match=r"'image': \(1, 3\), 'labels': \(3, 1\)"):
        overlay(IMAGE, LABELS.T, COLORS)
    with pytest.raises(ValueError, match="alpha=1.5"):
        overlay(IMAGE, LABELS, COLORS, alpha=1.5)


def test_error_map_tells_correct_wrong_and_ignored_apart():
    errors = error_map(np.array([[0, 0, 0]]), LABELS, 255)
    assert errors.tolist() == [[list(CORRECT), list(WRONG), list(IGNORED)]]


def test_comparison_panel_shows_the_four_pictures_and_the_classes_that_occur():
    generator = np.random.default_rng(0)
    labels = np.full((30, 40), 2, dtype=np.uint8)
    labels[:, :10], labels[0] = 0, 255
    prediction = np.full((30, 40), 2)
    image = generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)
    figure = comparison_panel(
        image,
        labels,
        prediction,
        colors=[*COLORS, (0, 0, 255)],
        class_names=("sky", "road", "car"),
        title="frame 7",
    )
    titles = [axes.get_title() for axes in figure.axes]
    # 10 of 40 columns are wrong in each of the 29 labelled rows.
    expected = ["image", "ground truth", "prediction", "errors (25.0% of labelled pixels)"]
    assert titles == expected
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert (shown[0] == image).all()
    assert (shown[1] != shown[2]).any()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["sky", "car", "wrong", "correct", "ignored"]
    assert [text.get_text() for text in figure.texts] == ["frame 7"]

    drawn = pixels(figure)
    assert (drawn == WRONG).all(axis=-1).mean() > 0.03
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= drawn.shape[1]


def test_comparison_panel_without_a_labelled_pixel_has_no_error_rate():
    labels = np.full((4, 4), 255)
    zeros = np.zeros((4, 4), dtype=int)
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    figure = comparison_panel(image, labels, zeros, colors=COLORS, class_names=("a", "b"))
    assert figure.axes[3].get_title() == "errors (no pixel is labelled)"


def run(offset: float, *, contrast: bool) -> dict[int, dict[str, float]]:
    metrics = {}
    for i in range(0, 100, 10):
        metrics[i] = {"loss_sem_seg": 1.0 + offset, "total_loss": 1.0 + offset, "lr": 0.1}
        if contrast:
            metrics[i] |= {"loss_contrast_res2": 0.2, "loss_contrast_res2_res3": 0.1}
            metrics[i] |= {"loss_contrast_res3": 0.4, "total_loss": 1.7 + offset}
    metrics[90]["sem_seg/mIoU"] = 50 + offset
    return metrics


def lines(axes) -> dict[str, list[float]]:
    return {
        line.get_label(): line.get_ydata().tolist()
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_curves_of_one_run_show_every_loss_and_the_miou():
    figure = plot_curves({"ms_cs": run(0.0, contrast=True)}, smoothing=1)
    losses, contrast, miou = figure.axes
    assert list(lines(losses)) == ["loss_sem_seg", "total_loss"]
    assert list(lines(contrast)) == [
        "loss_contrast_res2",
        "loss_contrast_res3",
        "loss_contrast_res2_res3",
    ]
    assert lines(contrast)["loss_contrast_res3"] == [0.4] * 10
    assert lines(miou) == {"ms_cs": [50.0]}
    assert [text.get_text() for text in miou.texts] == ["50.0"]
    assert pixels(figure).std() > 5


def test_curves_of_a_baseline_have_neither_contrast_nor_a_second_total():
    figure = plot_curves({"base": run(0.0, contrast=False)})
    assert [list(lines(axes)) for axes in figure.axes] == [["loss_sem_seg"], ["base"]]


def test_curves_of_several_runs_share_colours_and_sum_the_contrastive_terms():
    runs = {"base": run(0.0, contrast=False), "ms_cs": run(0.5, contrast=True)}
    figure = plot_curves(runs)
    losses, contrast, miou = figure.axes
    assert lines(losses) == {"base": [1.0] * 10, "ms_cs": [1.5] * 10}
    assert list(lines(contrast)) == ["ms_cs"]
    assert lines(contrast)["ms_cs"] == pytest.approx([0.7] * 10)
    assert lines(miou) == {"base": [50.0], "ms_cs": [50.5]}
    colors = {
        axes: {x.get_label(): to_rgb(x.get_color()) for x in axes.lines} for axes in figure.axes
    }
    assert colors[losses]["ms_cs"] == colors[contrast]["ms_cs"] == colors[miou]["ms_cs"]
    assert colors[losses]["base"] != colors[losses]["ms_cs"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "ms_cs"]
    top = miou.get_ylim()[1]
    assert top > 50.5


def test_smoothing_is_a_running_mean_that_nan_does_not_spread_through():
    values = [4.0, *[1.0] * 12, math.nan, *[1.0] * 15, 4.0]
    metrics = {i: {"loss_sem_seg": v, "total_loss": v} for i, v in enumerate(values)}
    figure = plot_curves({"run": metrics}, smoothing=3)
    smooth = lines(figure.axes[0])["loss_sem_seg"]
    expected = [2.5, 2.0, *[1.0] * 10, *[math.nan] * 3, *[1.0] * 13, 2.0, 2.5]
    assert smooth == pytest.approx(expected, nan_ok=True)


def test_a_short_run_is_not_smoothed_away():
    metrics = {i: {"loss_sem_seg": 10.0 - i, "total_loss": 10.0 - i} for i in range(10)}
    (axes,) = plot_curves({"run": metrics}).axes
    assert lines(axes)["loss_sem_seg"] == [10.0 - i for i in range(10)]


def test_class_iou_has_a_bar_per_class_and_run():
    first = {"mIoU": 40.0, "IoU-sky": 80.0, "IoU-car": 0.0, "IoU-bus": math.nan, "ACC-sky": 90.0}
    second = {"mIoU": 45.0, "IoU-sky": 70.0, "IoU-car": 20.0, "IoU-bus": math.nan}
    figure = plot_class_iou({"base": first, "ms_cs": second})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sky", "car", "bus"]
    assert [bar.get_width() for bar in axes.patches] == [80, 0, 0, 70, 20, 0]
    texts = [text.get_text() for text in axes.texts]
    absent = "not in the ground truth"
    assert texts == ["80.0", "0.0", absent, "70.0", "20.0", absent]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["base: mIoU 40.0", "ms_cs: mIoU 45.0"]
    # Bars of one class do not overlap, and the first class is on top.
    edges = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches)
    assert all(a[1] <= b[0] + 1e-9 for a, b in zip(edges, edges[1:], strict=False))
    assert axes.yaxis.get_inverted()


def test_plots_refuse_nothing_and_runs_of_different_classes():
    with pytest.raises(ValueError, match="no run"):
        plot_curves({})
    with pytest.raises(ValueError, match="smoothing=0"):
        plot_curves({"a": run(0.0, contrast=False)}, smoothing=0)
    with pytest.raises(ValueError, match=r"a has \['sky'\], b has \['car'\]"):
        plot_class_iou({"a": {"IoU-sky": 1.0}, "b": {"IoU-car": 1.0}})
