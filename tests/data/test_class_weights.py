"""Weights of classes from a dataset's labels. K: number of classes."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog
from omegaconf import OmegaConf
from PIL import Image

from contrast_d2.data.class_weights import class_weights
from contrast_d2.losses import CrossEntropyLoss

from .labelled_files import NAME, register, write


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    return write(tmp_path, monkeypatch)


def test_formulas(files, caplog: pytest.LogCaptureFixture) -> None:
    # Shares in the images that hold the class: 7/10, 1/7 and 2/3, of which 2/3 is the median.
    with caplog.at_level(logging.WARNING):
        assert class_weights(NAME) == pytest.approx([2 / 3 / 0.7, 2 / 3 * 7, 1.0, 1.0])
    assert "['train']" in caplog.text  # the absent class
    shares = [0.7, 0.1, 0.2]
    expected = [1 / math.log(1.02 + share) for share in shares]
    assert class_weights(NAME, scheme="inverse_log") == pytest.approx([*expected, 1.0])


def test_several_datasets_count_as_one(files, monkeypatch) -> None:
    for i, file in enumerate(files):
        register(f"half_{i}", [str(file)], monkeypatch)
    assert class_weights(["half_0", "half_1"]) == class_weights(NAME) != class_weights("half_0")


def test_in_a_config(files) -> None:
    cfg = OmegaConf.create({"dataset": {"train": [NAME]}}, flags={"allow_objects": True})
    cfg.loss = LazyCall(CrossEntropyLoss)(
        class_weights=LazyCall(class_weights)(dataset="${dataset.train}", scheme="inverse_log")
    )
    loss = instantiate(cfg.loss)
    assert loss.weight.tolist() == pytest.approx(class_weights(NAME, scheme="inverse_log"))


def test_shapes_are_counted_without_files(tmp_path, monkeypatch) -> None:
    """They are rendered; rare classes weigh more."""
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(tmp_path / "cache"))
    weights = class_weights("shapes_sem_seg_val")
    assert len(weights) == 9 and weights[0] < 0.2 < 5 < weights[-1] == max(weights)
    assert not (tmp_path / "cache").exists()


def test_mistakes_are_named(files, monkeypatch) -> None:
    with pytest.raises(ValueError, match="scheme='median'.*'median_frequency', 'inverse_log'"):
        class_weights(NAME, scheme="median")
    with pytest.raises(ValueError, match="'camvid' is not registered"):
        class_weights("camvid")
    with pytest.raises(ValueError, match="empty list"):
        class_weights([])
    with pytest.raises(ValueError, match=f"{NAME}.*shapes_sem_seg_val"):
        class_weights([NAME, "shapes_sem_seg_val"])

    monkeypatch.setitem(DatasetCatalog.data, NAME, lambda: [{"file_name": "a.jpg"}])
    with pytest.raises(ValueError, match=f"{NAME} has no labels for a.jpg"):
        class_weights(NAME)
    register(NAME, [str(files[0]), "/nowhere/b.png"], monkeypatch)
    with pytest.raises(ValueError, match="/nowhere/b.png"):
        class_weights(NAME)
    Image.fromarray(np.full((2, 2), 7, dtype=np.uint8)).save(files[0])
    register(NAME, [str(files[0])], monkeypatch)
    with pytest.raises(ValueError, match="no labelled pixel"):
        class_weights(NAME)
