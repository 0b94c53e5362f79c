"""What counts as read of a config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from detectron2.config import CfgNode, configurable

from contrast_d2.yacs.read_keys import ReadKeys, flat


class Part:
    @configurable
    def __init__(self, width: int) -> None:
        self.width = width

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"width": cfg.A.WIDTH}


A = {"A.WIDTH", "A.DEPTH"}


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda cfg: cfg.A, set()),  # a section by itself says nothing yet
        (lambda cfg: cfg.A.WIDTH, {"A.WIDTH"}),
        (lambda cfg: cfg["A"]["DEPTH"], {"A.DEPTH"}),
        (lambda cfg: cfg.get("SEED"), {"SEED"}),
        (lambda cfg: cfg.get("NONE", 3), set()),
        (lambda cfg: "WIDTH" in cfg.A, set()),
        (lambda cfg: dict(**cfg.A), A),
        (lambda cfg: dict(cfg.A), A),
        (lambda cfg: list(cfg.A.items()), A),
        (lambda cfg: list(cfg.A.values()), A),
        (lambda cfg: {key.lower(): cfg.A[key] for key in cfg.A}, A),
        (lambda cfg: cfg.A.clone(), A),
        (lambda cfg: copy.deepcopy(cfg), A | {"SEED"}),
        (lambda cfg: Part(cfg), {"A.WIDTH"}),
    ],
)
def test_keys_that_are_read_are_noted(read: Callable[[CfgNode], Any], expected: set[str]) -> None:
    cfg = CfgNode({"A": {"WIDTH": 3, "DEPTH": 2}, "SEED": 1})
    keys = ReadKeys(cfg, set())
    assert keys.read == set()  # to make it reads nothing
    assert read(keys) == read(cfg) or isinstance(read(cfg), Part)
    assert keys.read == expected


def test_flat_has_every_value_by_its_full_key() -> None:
    cfg = CfgNode({"A": {"B": {"C": (1, 2)}, "D": None}, "E": "x"})
    assert flat(cfg) == {"A.B.C": [1, 2], "A.D": None, "E": "x"}
