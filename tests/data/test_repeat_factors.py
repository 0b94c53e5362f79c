"""How often images come in training, by the classes in them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import contrast_d2.data.repeat_factors as module
from contrast_d2.data.repeat_factors import repeat_factors

from .labelled_files import NAME, register, write

# CaDIS, training videos: share of the images that hold a class, and its repeat factor at 0.15.
TASK_2 = {
    16: (0.0304, 2.22),
    14: (0.0653, 1.52),
    10: (0.0679, 1.49),
    9: (0.0814, 1.36),
    12: (0.0831, 1.34),
    11: (0.0905, 1.29),
    8: (0.0954, 1.25),
    15: (0.1226, 1.11),
    2: (0.1275, 1.08),
}
TASK_3 = {
    24: (0.0054, 5.25),
    20: (0.0149, 3.17),
    21: (0.0163, 3.03),
    22: (0.0172, 2.95),
    18: (0.0183, 2.86),
    19: (0.0304, 2.22),
    23: (0.0304, 2.22),
    11: (0.0808, 1.36),
    7: (0.0974, 1.24),
    8: (0.1321, 1.07),
}


@pytest.mark.parametrize("rows", [TASK_2, TASK_3], ids=["task 2", "task 3"])
def test_factors_of_cadis(monkeypatch: pytest.MonkeyPatch, rows: dict) -> None:
    counts = np.zeros((10_000, 25), dtype=np.int64)
    counts[:, 0] = 1000  # in every image
    first = 0
    for class_id, (share, _) in rows.items():  # no two of them in one image
        counts[first : first + round(10_000 * share), class_id] = 5
        first += round(10_000 * share)
    monkeypatch.setattr(module, "count_classes", lambda name: counts)
    factors = repeat_factors(["cadis"], 0.15)
    for class_id, (_, factor) in rows.items():
        found = np.unique(factors[counts[:, class_id] > 0])
        assert found == pytest.approx([factor], abs=0.025)  # the shares have four digits
    assert set(factors[first:]) == {1.0}


def test_the_rarest_class_of_an_image_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.array([[1, 0, 0], [1, 2, 0], [1, 2, 9], [1, 0, 0]])
    monkeypatch.setattr(module, "count_classes", lambda name: counts)
    expected = [1, math.sqrt(0.9 / 0.5), math.sqrt(0.9 / 0.25), 1]
    assert repeat_factors(["a"], 0.9) == pytest.approx(expected)


def test_an_image_of_void_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "count_classes", lambda name: np.array([[0, 0], [3, 1]]))
    assert repeat_factors(["a"], 1.0) == pytest.approx([1, math.sqrt(2)])


def test_classes_are_counted_after_the_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two label values of one class in one image are one occurrence, and void is none."""
    paths = write(tmp_path, monkeypatch)
    metadata = register(NAME, [str(path) for path in paths], monkeypatch)
    metadata.stuff_dataset_id_to_contiguous_id.update({10: 0, 20: 1, 30: 1, 40: 2})
    metadata.stuff_classes[:] = ["road", "thing", "train"]
    Image.fromarray(np.array([[20, 30, 7]], dtype=np.uint8)).save(paths[1])
    # Class 0 is in one of two images, class 1 in both.
    assert repeat_factors([NAME], 1.0) == pytest.approx([math.sqrt(2), 1])


def test_a_threshold_is_a_share(subtests: pytest.Subtests) -> None:
    for threshold in [0, -0.1, 1.5]:
        with subtests.test(threshold=threshold):
            with pytest.raises(ValueError, match=f"repeat_threshold={threshold}"):
                repeat_factors([NAME], threshold)
