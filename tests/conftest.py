"""Fixtures that all tests share."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

# It refuses to load after the standard library's distutils, which a test may need first.
import setuptools  # noqa: F401
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tests run beside each other on few cores, and sums must not depend on how many there are.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Folder of CamVid: images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png; void is 11."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if not root:
        pytest.skip("DETECTRON2_DATASETS is not set: it names the folder that holds camvid/")
    folder = Path(root) / "camvid"
    if not (folder / "annotations" / "train").is_dir():
        pytest.skip(f"no CamVid in {folder}")
    return folder
