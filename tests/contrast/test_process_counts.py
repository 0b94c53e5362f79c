"""One, two and four gloo processes on the same global batch."""

from __future__ import annotations

import pytest
import torch

from ..helpers import run_processes
from .process_counts import (
    METHODS,
    SCENES,
    SPLITS,
    TOLERANCE,
    Result,
    difference,
    in_order,
    joined,
    run_all,
    run_steps,
)

CASES = [(method, scene, torch.float64) for method in METHODS for scene in SCENES]
CASES += [(method, "common", torch.float32) for method in METHODS]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> list[dict[tuple, Result]]:
    return run_processes(run_all, request.param, CASES, SPLITS[request.param])


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[dict], method: str) -> None:
    for case in CASES:
        if case[0] != method:
            continue
        _, scene, dtype = case
        one = run_steps(method, scene, SPLITS[len(ranks)], dtype)
        several = [results[case] for results in ranks]
        assert one["parameters"].keys() and one["features"].keys()
        for kind, value in difference(one, joined(several)).items():
            assert value < TOLERANCE[dtype], (case, kind)
        losses = one["losses"].values()
        # PNE compares pixels of an image that has several classes.
        alone = scene == "no class in common" and method in ("PNE", "sum")
        assert all((loss > 0) == (scene != "all void") or alone for loss in losses), case
        assert all(gradient.isfinite().all() for gradient in one["parameters"].values())
        for rank in several:
            assert all(rank["buffers"][n].equal(b) for n, b in several[0]["buffers"].items()), case
        # What is remembered is the same, and not to rounding.
        if "memory" in method:
            assert one["buffers"]["memory.filled"].any() == (scene != "all void")
            for name, buffer in in_order(one["buffers"]).items():
                assert buffer.equal(in_order(several[0]["buffers"])[name]), (case, name)
