"""Learning rates: their schedule, and their factors by part of the model."""

from __future__ import annotations

import pytest
import torch
from detectron2.solver import LRMultiplier

from contrast_d2.config.solver import optimizer_params, poly_schedule


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


def test_decay(subtests: pytest.Subtests) -> None:
    for power in [0.9, 1.0, 2.0]:
        with subtests.test(power=power):
            expected = [0.5 * (1 - t / 40) ** power for t in range(40)]
            assert rates(40, power=power) == pytest.approx(expected, rel=1e-12)


def test_decay_to_a_minimum() -> None:
    expected = [0.5 * (0.02 + 0.98 * (1 - t / 40) ** 0.9) for t in range(40)]
    assert rates(40, min_factor=0.02) == pytest.approx(expected, rel=1e-12)
    found = rates(40, min_factor=0.02, warmup_iters=10, warmup_factor=0.0)
    assert found[0] == 0 and found[10:] == pytest.approx(expected[10:], rel=1e-12)


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


def test_mistakes(subtests: pytest.Subtests) -> None:
    for arguments, message in [
        ({"max_iter": 0}, "train.max_iter=0"),
        ({"max_iter": 10, "warmup_iters": 10}, "warmup_iters=10: .*below max_iter=10"),
        ({"max_iter": 10, "warmup_iters": -1}, "warmup_iters=-1"),
        ({"max_iter": 10, "power": 0}, "power=0"),
        ({"max_iter": 10, "power": float("nan")}, "power=nan"),
        ({"max_iter": 10, "warmup_factor": 1.5}, "warmup_factor=1.5"),
        ({"max_iter": 10, "warmup_factor": -0.1}, "warmup_factor=-0.1"),
        ({"max_iter": 10, "min_factor": 1.0}, "min_factor=1.0"),
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(ValueError, match=message):
                poly_schedule(**arguments)


def test_the_head_learns_faster_than_the_backbone() -> None:
    model = torch.nn.ModuleDict(
        {
            "backbone": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)),
            "sem_seg_head": torch.nn.Linear(2, 3),
            "contrast": torch.nn.Linear(2, 4),
        }
    )
    model.backbone[0].bias.requires_grad_(False)
    groups = optimizer_params(
        model, base_lr=0.01, head_lr_factor=10, weight_decay=0.1, weight_decay_norm=0.0
    )
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    linear, norm = model.backbone
    expected = {id(linear.weight): (0.01, 0.1)}
    expected |= {id(p): (0.01, 0.0) for p in norm.parameters()}
    others = (model.sem_seg_head, model.contrast)
    expected |= {id(p): (0.1, 0.1) for part in others for p in part.parameters()}
    assert found == expected


def test_a_factor_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="head_lr_factor=0"):
        optimizer_params(torch.nn.Module(), base_lr=0.01, head_lr_factor=0)
