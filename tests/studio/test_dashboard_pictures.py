"""Pictures of what a contrast method did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from contrast_d2.contrast import DrawnPixels, Inspection, Similarities
from contrast_d2.studio.dashboard_pictures import (
    CONTOUR,
    bars_figure,
    by_outcome,
    class_counts,
    draws_picture,
    figure_pixels,
    paint_squares,
    similarity_figure,
)

RIGHT, WRONG, NEGATIVE, SAMPLE = (86, 180, 233), (213, 94, 0), (240, 228, 66), (0, 158, 115)
NAMES = ["Road", "Car", "Sky"]


def drawn(rows: list[tuple[int, int, int, int, bool]]) -> DrawnPixels:
    columns = zip(*rows, strict=True)
    return DrawnPixels(*(torch.tensor(x) for x in columns))


def labels(height: int = 480, width: int = 500) -> Tensor:
    """Two images: class 0 to the left of a line and 1 to the right of it, in the second 2."""
    result = torch.zeros(2, height, width, dtype=torch.int64)
    result[0, :, width // 2 :] = 1
    result[1] = 2
    return result


def panel(picture: np.ndarray, number: int, height: int, width: int) -> np.ndarray:
    """One image of two beside each other: below its title, above the legend."""
    left = 0 if number == 0 else picture.shape[1] - width
    flat = picture[:, left : left + width]
    top = next(y for y in range(len(flat)) if flat[y].mean() < 128)
    return flat[top : top + height]


DRAWS = {
    "anchors": drawn([(0, 100, 40, 0, False), (0, 200, 60, 0, True), (1, 300, 400, 2, False)]),
    "boundary negatives": drawn([(0, 200, 60, 0, True), (1, 50, 50, 2, True)]),
}


def test_marks_are_where_pixels_were_drawn() -> None:
    images = [np.full((480, 500, 3), 100, dtype=np.uint8)] * 2
    picture = draws_picture(images, ["a", "b"], labels(), DRAWS, num_classes=3)
    first, second = (panel(picture, n, 480, 500) for n in range(2))
    assert tuple(first[100, 40]) == RIGHT
    assert tuple(first[200, 60]) == WRONG  # on top of the frame, which stays in sight
    assert tuple(first[200, 64]) == NEGATIVE and tuple(first[196, 60]) == NEGATIVE
    assert tuple(second[300, 400]) == RIGHT
    assert tuple(second[50, 50]) == (80, 80, 80)  # a frame is hollow
    assert tuple(second[50, 54]) == NEGATIVE
    assert tuple(second[100, 40]) == (80, 80, 80)  # the other image's mark
    # The boundary of classes is one pixel wide, and at the edge there is none.
    line = (first[400] == CONTOUR).all(axis=1).nonzero()[0]
    assert line.tolist() == [250]
    assert not (second[150] == CONTOUR).all(axis=1).any()


@pytest.mark.parametrize(
    ("size", "factor"), [((128, 160), 4.0), ((480, 500), 1.0), ((960, 1500), 0.5)]
)
def test_images_are_enlarged_and_reduced(size: tuple[int, int], factor: float) -> None:
    height, width = size
    draws = {"anchors": drawn([(0, height // 2, width // 4, 0, True)])}
    images = [np.full((*size, 3), 100, dtype=np.uint8)]
    picture = draws_picture(images, ["a"], labels(*size)[:1], draws, num_classes=3)
    shown = int(height * factor), int(width * factor)
    assert picture.shape[1] == shown[1]
    found = (panel(picture, 0, *shown) == WRONG).all(axis=2).nonzero()
    half = int(factor) // 2
    assert [float(x.mean()) for x in found] == [shown[0] / 2 + half, shown[1] // 4 + half]


def test_padding_is_black_and_marks_at_the_edge_stay_in_the_picture() -> None:
    images = [np.full((470, 480, 3), 100, dtype=np.uint8)]
    ignored = labels()[:1]
    ignored[:, 470:], ignored[:, :, 480:] = 255, 255
    draws = {"anchors": drawn([(0, 0, 0, 0, False), (0, 479, 499, 1, False)])}
    picture = draws_picture(images, ["a"], ignored, draws, num_classes=3)
    shown = panel(picture, 0, 480, 500)
    assert tuple(shown[475, 200]) == (0, 0, 0) == tuple(shown[200, 490])
    assert tuple(shown[0, 1]) == RIGHT or tuple(shown[1, 1]) == RIGHT
    assert tuple(shown[478, 498]) == RIGHT


def test_a_square_has_its_size_and_a_rim() -> None:
    canvas = np.full((20, 30, 3), 9, dtype=np.uint8)
    paint_squares(canvas, np.array([[8, 10]]), 5, RIGHT)
    expected = np.full((20, 30, 3), 9, dtype=np.uint8)
    expected[6:11, 8:13], expected[7:10, 9:12] = 0, RIGHT
    assert np.array_equal(canvas, expected)
    paint_squares(canvas, np.array([[8, 20]]), 7, NEGATIVE, hollow=True)
    expected[5:12, 17:24], expected[6:11, 18:23], expected[7:10, 19:22] = 0, NEGATIVE, 9
    assert np.array_equal(canvas, expected)


def test_hard_anchors_are_those_that_are_wrong() -> None:
    parts = by_outcome("anchors", DRAWS["anchors"])
    assert {name: part.row.tolist() for name, part in parts.items()} == {
        "anchors": [100, 300],
        "hard anchors": [200],
    }
    unknown = DRAWS["anchors"]._replace(wrong=None)
    assert by_outcome("anchors", unknown) == {"anchors": unknown}
    assert list(by_outcome("samples", DRAWS["anchors"])) == ["samples"]


def inspection() -> Inspection:
    result = Inspection(3)
    result.draws = {"res2": dict(DRAWS)}
    result.anchor_pixels = {"res5": torch.tensor([7, 0, 2])}
    matrix = torch.tensor([[1.0, -1.0, torch.nan], [0.0, 1.0, 0.0], [-0.01, 0.0, 1.0]])
    for term in ("res2", "res3"):
        result.similarities[term] = Similarities(torch.rand(3), torch.rand(3), matrix)
    return result


def test_pixels_are_counted_by_class() -> None:
    counts = class_counts(inspection())
    assert {s: {n: c.tolist() for n, c in rows.items()} for s, rows in counts.items()} == {
        "res2": {
            "anchors": [1, 0, 1],
            "hard anchors": [1, 0, 0],
            "boundary negatives": [1, 0, 1],
        },
        "res5": {"pixels of the anchor": [7, 0, 2]},
    }


def test_bars_are_as_long_as_the_counts() -> None:
    figure = bars_figure(class_counts(inspection()), NAMES, "pixels")
    first, second = figure.axes
    assert [t.get_text() for t in first.get_yticklabels()] == NAMES
    assert [bar.get_width() for bar in first.patches] == [1, 0, 1, 1, 0, 0, 1, 0, 1]
    assert [bar.get_width() for bar in second.patches] == [7, 0, 2]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [
        "anchors",
        "hard anchors",
        "boundary negatives",
        "pixels of the anchor",
    ]


def test_matrices_say_what_they_show() -> None:
    figure = similarity_figure(inspection(), NAMES)
    first = figure.axes[0]
    assert first.get_title(loc="left") == "res2"
    texts = {t.get_position(): t.get_text() for t in first.texts}
    assert texts[1, 0] == "\N{MINUS SIGN}1.0" and texts[0, 2] == "0.0"
    assert (2, 0) not in texts  # nothing to average
    picture = figure_pixels(figure)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.std() > 10


def test_a_hundred_classes_are_not_named() -> None:
    many = Inspection(100)
    many.similarities["res2"] = Similarities(torch.rand(3), torch.rand(3), torch.rand(100, 100))
    figure = similarity_figure(many, [str(k) for k in range(100)])
    assert not figure.axes[0].texts and not figure.axes[0].get_xticklabels()
    counts = {"res2": {"anchors": np.arange(100)}}
    figure = bars_figure(counts, [str(k) for k in range(100)], "pixels")
    assert not figure.axes[0].get_yticklabels()
    assert figure_pixels(figure).shape[0] < 1200
