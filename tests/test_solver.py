"""Learning-rate schedules."""

from __future__ import annotations

import pytest
import torch
from detectron2.solver import LRMultiplier

from contrast_d2.solver import poly_schedule


def rates(max_iter: int, **arguments) -> list[float]:
    """The learning rate of every iteration, of a real optimizer that starts from 0.5."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = LRMultiplier(optimizer, poly_schedule(max_iter=max_iter, **arguments), max_iter)
    found = []
    for _ in range(max_iter):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_decay(power: float) -> None:
    expected = [0.5 * (1 - t / 40) ** power for t in range(40)]
    assert rates(40, power=power) == pytest.approx(expected, rel=1e-12)


def test_power_is_the_fields_by_default() -> None:
    assert rates(10)[5] == pytest.approx(0.5 * 0.5**0.9)


def test_warm_up_rises_in_a_line_to_the_curve() -> None:
    found = rates(40, warmup_iters=10, warmup_factor=0.01)
    curve = [0.5 * (1 - t / 40) ** 0.9 for t in range(40)]
    assert found[0] == pytest.approx(0.5 * 0.01)
    assert found[10:] == pytest.approx(curve[10:], rel=1e-12)
    step = (curve[10] - found[0]) / 10
    assert found[:10] == pytest.approx([found[0] + t * step for t in range(10)])


def test_warm_up_from_nothing_and_for_one_iteration() -> None:
    found = rates(5, warmup_iters=1, warmup_factor=0.0)
    assert found[0] == 0
    assert found[1:] == pytest.approx([0.5 * (1 - t / 5) ** 0.9 for t in range(1, 5)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_iter": 0}, "train.max_iter=0"),
        ({"max_iter": 10, "warmup_iters": 10}, "warmup_iters=10: .*below max_iter=10"),
        ({"max_iter": 10, "warmup_iters": -1}, "warmup_iters=-1"),
        ({"max_iter": 10, "power": 0}, "power=0"),
        ({"max_iter": 10, "power": float("nan")}, "power=nan"),
        ({"max_iter": 10, "warmup_factor": 1.5}, "warmup_factor=1.5"),
        ({"max_iter": 10, "warmup_factor": -0.1}, "warmup_factor=-0.1"),
    ],
)
def test_mistakes(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poly_schedule(**arguments)
