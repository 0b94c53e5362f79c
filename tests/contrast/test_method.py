"""What contrast methods have in common."""

from __future__ import annotations

import copy

import pytest
import torch

from contrast_d2.contrast import Warmup
from contrast_d2.contrast.method import connected_zero

from ..helpers import HostWaits


@pytest.mark.parametrize(
    ("start", "ramp", "factors"),
    [
        (0, 0, [1, 1, 1]),
        (2, 0, [0, 0, 1, 1]),
        (0, 3, [0.25, 0.5, 0.75, 1, 1]),
        (2, 1, [0, 0, 0.5, 1, 1]),
    ],
)
def test_factor_by_pass(start: int, ramp: int, factors: list[float]) -> None:
    warmup = Warmup(start, ramp)
    assert [warmup() for _ in factors] == factors


def test_a_resumed_run_goes_on_where_it_was() -> None:
    warmup = Warmup(start=1, ramp=3)
    factors = [warmup() for _ in range(3)]
    resumed = Warmup(start=1, ramp=3)
    assert resumed() == factors[0]  # it has its own count before it is loaded
    resumed.load_state_dict(copy.deepcopy(warmup.state_dict()))
    assert [resumed() for _ in range(3)] == [0.75, 1, 1]
    assert resumed.state_dict() == {"passes": torch.tensor(6)}


def test_the_count_is_read_once() -> None:
    warmup = Warmup(start=2)
    with HostWaits() as waits:
        for _ in range(4):
            warmup()
    assert len(waits.calls) == 1


@pytest.mark.parametrize("name", ["start", "ramp"])
def test_negative_passes_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Warmup\({name}=-1\)"):
        Warmup(**{name: -1})


def test_zero_reaches_everything_and_ignores_values() -> None:
    tensors = [torch.tensor([torch.inf, 1.0]), torch.tensor([[torch.nan]]), torch.zeros(0, 3)]
    for tensor in tensors:
        tensor.requires_grad_()
    zero = connected_zero(tensors)
    assert zero.item() == 0
    zero.backward()
    assert all((x.grad == 0).all() for x in tensors)
