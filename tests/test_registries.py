"""What a yaml config calls by name, and options by keyword."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from torch import nn

from contrast_d2.registries import (
    CONTRAST_REGISTRY,
    SEG_LOSS_REGISTRY,
    arguments_of,
    build_named,
    set_options,
)

CHANNELS = {"res2": 4, "res3": 4, "res4": 4, "res5": 4, "p2": 4, "pre_logits": 4}
KNOWN = {
    "dataset": {"num_classes": 7, "ignore_label": 77},
    "train": {"max_iter": 9},
    "channels": CHANNELS,
}


class Whole:
    def __init__(
        self,
        width: int,
        *,
        rate: float = 2,
        name: str = "x",
        exact: bool = False,
        limit: int | None = None,
        weights: Mapping[str, float] | None = None,
        part: Whole | None = None,
    ) -> None:
        self.width, self.rate, self.name, self.weights, self.part = width, rate, name, weights, part


@pytest.mark.parametrize("registry", [CONTRAST_REGISTRY, SEG_LOSS_REGISTRY])
def test_every_preset_is_built(registry) -> None:
    for name, _ in registry:
        module = build_named(registry, {"NAME": name, "OPTIONS": {}}, "PATH", KNOWN)
        assert isinstance(module, nn.Module)
        labels = {getattr(m, "ignore_label", 77) for m in module.modules()}
        classes = {getattr(m, "num_classes", 7) for m in module.modules()}
        assert labels == {77} and classes == {7}, name


def test_options_reach_nested_parts() -> None:
    options = {"TEMPERATURE": 0.5, "MEMORY": {"REGIONS_PER_CLASS": 3}, "FEATURE": "res4"}
    section = {"NAME": "pixel_memory", "OPTIONS": options}
    method = build_named(CONTRAST_REGISTRY, section, "PATH", KNOWN)
    assert method.temperature == 0.5 and method.memory.slots["regions"] == 3
    assert list(method.projector.heads) == ["res4"]


def test_values_replace_those_of_the_call_and_its_defaults() -> None:
    node = L(Whole)(width=1, weights={"a": 1.0}, part=L(Whole)(width="${..width}"))
    options = {"RATE": 1, "LIMIT": 4, "WEIGHTS": {"b": 2.0}, "PART": {"NAME": "y", "EXACT": True}}
    set_options(node, options, "PATH")
    whole = instantiate(node)
    assert (whole.width, whole.rate, whole.weights) == (1, 1, {"b": 2.0})
    assert (whole.part.width, whole.part.name) == (1, "y")


def test_arguments() -> None:
    assert arguments_of(Whole, {"RATE": 0.5}, "A", width=3) == {"width": 3, "rate": 0.5}


def test_mistakes_in_options(subtests: pytest.Subtests) -> None:
    for options, message in [
        ({"RAET": 1.0}, r"unknown config key A.RAET. Did you mean A.RATE\?"),
        ({"LIMIT": 1, "NAME": 3}, "A.NAME=3: needs a value like 'x'"),
        ({"RATE": "fast"}, "A.RATE='fast': needs a value like 2"),
        ({"EXACT": 1}, "A.EXACT=1: needs a value like False"),
        ({"PART": {"WIDTH": 1}}, "A.PART={'WIDTH': 1}: has no keys here"),
        ({"WIDTH": 1}, "A.WIDTH: detectron2 has a key of its own"),
    ]:
        with subtests.test(options=options):
            with pytest.raises(ValueError, match=message):
                arguments_of(Whole, options, "A", width=3)


def test_what_is_missing() -> None:
    with pytest.raises(ValueError, match="A.WIDTH is not set, and has no default"):
        arguments_of(Whole, {"RATE": 0.5}, "A")
