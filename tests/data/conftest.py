from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def tiny_camvid(tmp_path, monkeypatch) -> Path:
    """A CamVid folder of three small training images and no other split."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "camvid"
    for part in ("images/train", "annotations/train"):
        (folder / part).mkdir(parents=True)
    for name in ("b", "a", "c"):
        image = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"images/train/{name}.png")
        labels = rng.integers(0, 12, (6, 8), dtype=np.uint8)
        Image.fromarray(labels).save(folder / f"annotations/train/{name}.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return folder
