"""Labels that do not lie on their image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from contrast_d2.data.check.alignment import Alignment, measure_alignment, misaligned
from contrast_d2.data.check.facts import read_pair


def scene(seed: int, height: int = 120, width: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Grey boxes under noise, and their labels."""
    rng = np.random.default_rng(seed)
    classes = np.zeros((height, width), dtype=np.int64)
    for k in range(1, 7):
        y, x = rng.integers(0, height - 30), rng.integers(0, width - 30)
        classes[y : y + rng.integers(12, 40), x : x + rng.integers(12, 40)] = k
    shades = rng.permutation(np.linspace(40, 210, 7))
    noisy = shades[classes] + rng.normal(0, 8, classes.shape)
    return noisy.clip(0, 255).astype(np.uint8), classes


@pytest.mark.parametrize("shift", [(0, 0), (0, 25), (-14, 9)])
def test_the_shift_is_measured(shift) -> None:
    gray, classes = scene(0)
    moved = np.roll(classes, [-s for s in shift], (0, 1))
    alignment = measure_alignment(gray, moved)
    if shift == (0, 0):
        assert alignment.here > 10 and alignment.lead < -3
    else:
        assert alignment.shift == shift  # what takes the labels back
        assert alignment.elsewhere > 10 and alignment.lead > 3


def test_the_shift_of_a_large_image_is_in_its_own_pixels() -> None:
    gray, classes = scene(1, 300, 400)
    large = [np.kron(array, np.ones((4, 4), array.dtype)) for array in (gray, classes)]
    alignment = measure_alignment(large[0], np.roll(large[1], -160, axis=1))
    down, right = alignment.shift
    assert abs(down) <= 4 and abs(right - 160) <= 4


def test_annotators_are_allowed_a_few_pixels() -> None:
    gray, classes = scene(2)
    assert measure_alignment(gray, np.roll(classes, 2, axis=1)).lead < 0
    assert measure_alignment(gray, np.roll(classes, 6, axis=1)).lead > 3


def test_void_around_objects_does_not_hide_them() -> None:
    gray, classes = scene(3)
    image = Image.fromarray(classes.astype(np.uint8))
    inner = np.asarray(image.filter(ImageFilter.MinFilter(3)))
    ring = np.asarray(image.filter(ImageFilter.MaxFilter(3))) != inner
    alignment = measure_alignment(gray, np.roll(np.where(ring, -1, classes), -20, axis=0))
    assert abs(alignment.shift[0] - 20) <= 1 and alignment.shift[1] in (-1, 0, 1)


def test_nothing_is_measured_where_nothing_is_to_be_seen() -> None:
    gray, classes = scene(4)
    assert measure_alignment(gray, np.zeros_like(classes)) is None
    assert measure_alignment(np.full_like(gray, 7), classes) is None


def test_a_lead_counts_against_the_habit_of_the_dataset() -> None:
    good = [Alignment(20.0 + i % 5, 5.0, (9, 9)) for i in range(30)]
    bad = Alignment(2.0, 11.0, (0, 87))
    low_peak = Alignment(0.5, 5.0, (0, 40))  # as noise has it
    assert misaligned([*good, bad, low_peak]) == [*[False] * 30, True, False]
    assert misaligned([bad]) == [True]
    # Where many labels fit badly, one that fits a bit worse says nothing.
    vague = [Alignment(4.0, 4.0 + 0.8 * (i % 5), (5, 5)) for i in range(30)]
    assert not any(misaligned(vague))
    assert all(misaligned([bad] * 12))  # shifted as a whole
    assert misaligned([]) == []


def test_camvids_shifted_label_is_found(camvid) -> None:
    """The neighbours of the frame in its clip lie where they should."""
    id_to_class = {k: k for k in range(11)}
    measured = {}
    for frame in range(2460, 2790, 30):
        name = f"test/Seq05VD_f{frame:05d}"
        record = {
            "file_name": str(camvid / f"images/{name}.jpg"),
            "sem_seg_file_name": str(camvid / f"annotations/{name}.png"),
        }
        measured[frame] = read_pair("test", record, id_to_class).alignment
    flags = misaligned(list(measured.values()))
    assert [frame for frame, flag in zip(measured, flags, strict=True) if flag] == [2610]
    assert measured[2610].shift == (0, 87)
