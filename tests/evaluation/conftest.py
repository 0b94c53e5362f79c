"""Small datasets in detectron2's catalog."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from .catalog import register

_numbers = itertools.count()


@pytest.fixture
def make_dataset(tmp_path: Path) -> Iterator[Callable[[Sequence[np.ndarray], Sequence[str]], str]]:
    names = []

    def make(label_maps: Sequence[np.ndarray], classes: Sequence[str]) -> str:
        names.append(f"evaluation_test_{next(_numbers)}")
        register(names[-1], tmp_path, label_maps, classes)
        return names[-1]

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
