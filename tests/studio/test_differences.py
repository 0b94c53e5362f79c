from __future__ import annotations

import sys

import numpy as np
import pytest

from contrast_d2.studio.differences import (
    FIRST,
    NEITHER,
    SECOND,
    Region,
    agreement,
    differing_regions,
)

SIZE = (100, 150)


def maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two predictions that agree, and the labels, which say the same."""
    return tuple(np.zeros(SIZE, dtype=np.uint8) for _ in range(3))


def test_boxes_are_where_the_predictions_differ_and_say_who_is_right() -> None:
    first, second, labels = maps()
    second[0:20, 0:30] = 1  # the first is right: labels stay 0
    second[40:70, 100:150] = labels[40:70, 100:150] = 2  # the second is, up to the border
    first[80:100, 20:40], second[80:100, 20:40], labels[80:100, 20:40] = 3, 4, 5
    first[80:100, 60:71], labels[80:100, 60:71] = 1, 255
    assert differing_regions(first, second, labels) == [
        Region(40, 100, 70, 150, 1500, SECOND),
        Region(0, 0, 20, 30, 600, FIRST),
        Region(80, 20, 100, 40, 400, NEITHER),
        Region(80, 60, 100, 71, 220, None),
    ]
    assert {region.better for region in differing_regions(first, second)} == {None}


def test_seams_and_specks_are_left_out() -> None:
    first, second, _ = maps()
    first[:, 50:52] = 1  # two pixels wide, a seam; the square has three
    first[10:15, 10:15] = 1  # 25 of 15000 pixels
    assert differing_regions(first, second) == []
    assert len(differing_regions(first, second, least_width=0)) == 1
    # The seam leads from one region to the other, which are not one for that.
    first[0:20, 40:60] = first[80:100, 40:60] = 1
    found = differing_regions(first, second)
    assert [(r.top, r.bottom) for r in found] == [(0, 20), (80, 100)]


def test_what_runs_out_of_the_image_is_no_seam() -> None:
    first, second, _ = maps()
    first[98:, 20:80] = 1
    assert [region[:4] for region in differing_regions(first, second)] == [(98, 20, 100, 80)]


def test_boxes_that_overlap_become_one() -> None:
    first, second, _ = maps()
    first[10:50, 10:16] = first[44:50, 10:60] = 1  # the two legs of an L
    first[10:30, 30:60] = 1  # lies in its box, touches nothing
    first[60:80, 100:120] = 1
    boxes = {(r.top, r.left, r.bottom, r.right, r.pixels) for r in differing_regions(first, second)}
    assert boxes == {(10, 10, 50, 60, 6 * 40 + 6 * 44 + 600), (60, 100, 80, 120, 400)}


def test_boxes_that_meet_only_once_joined_become_one() -> None:
    first, second, _ = maps()
    first[0:60, 0:6] = first[54:60, 0:60] = 1
    first[20:30, 30:60] = first[20:30, 70:140] = first[10:60, 100:106] = 1
    (left, right) = sorted(differing_regions(first, second), key=lambda r: r.left)
    assert (left.left, left.right, right.left, right.right) == (0, 60, 70, 140)
    first[24:36, 50:66] = 1  # widens the box of the left ones, not up to the right one
    first[30:36, 64:80] = 1  # reaches into the right one
    assert len(differing_regions(first, second)) == 1


def test_half_of_the_pixels_are_not_most() -> None:
    first, second, labels = maps()
    first[0:20, 0:20], labels[0:20, 10:20] = 1, 1  # each is right in one half
    (region,) = differing_regions(first, second, labels)
    assert region.better == NEITHER


def test_agreement_counts_labelled_pixels() -> None:
    first = np.array([[0, 0, 1, 1, 2]])
    second = np.array([[0, 1, 2, 2, 3]])
    labels = np.array([[9, 1, 1, 255, 0]])
    found = agreement(first, second, labels)
    assert found.differing == 0.8
    assert (found.first, found.second) == pytest.approx((1 / 3, 1 / 3))
    assert np.isnan(agreement(first, second, None)[1:]).all()
    assert np.isnan(agreement(first, first, labels).first)


def test_refuses_other_sizes_and_limits() -> None:
    first, second, labels = maps()
    with pytest.raises(ValueError, match=r"'labels': \(99, 150\)"):
        differing_regions(first, second, labels[1:])
    with pytest.raises(ValueError, match="least_area=4"):
        differing_regions(first, second, least_area=4)


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    first, second, _ = maps()
    with pytest.raises(ValueError, match=r"pip install scipy.*\[demo\]"):
        differing_regions(first, second)
