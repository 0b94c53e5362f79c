"""Learning rates: their schedule, and their factors by part of the model."""

from __future__ import annotations

from typing import Any

from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import ParamScheduler, PolynomialDecayParamScheduler
from torch import nn


def poly_schedule(
    *,
    max_iter: int,
    power: float = 0.9,
    warmup_iters: int = 0,
    warmup_factor: float = 1e-3,
    min_factor: float = 0.0,
) -> ParamScheduler:
    """The multiplier m + (1 - m) (1 - t / max_iter)^power of the learning rate, with m of
    `min_factor`, and optional linear warm-up.

    Args:
        max_iter: length of the training in iterations.
        power: of the decay; 1 is linear.
        warmup_iters: iterations in which the multiplier rises from `warmup_factor` to the curve.
        warmup_factor: multiplier of iteration 0, with warm-up.
        min_factor: what the multiplier falls to.

    Raises:
        ValueError: a warm-up that is not shorter than the training, or a number out of range.
    """
    if max_iter < 1:
        raise ValueError(f"train.max_iter={max_iter}: needs at least 1.")
    if not 0 <= warmup_iters < max_iter:
        raise ValueError(
            f"warmup_iters={warmup_iters}: must be 0 or more and below max_iter={max_iter}."
        )
    if not power > 0:
        raise ValueError(f"power={power}: must be above 0.")
    if not 0 <= warmup_factor <= 1:
        raise ValueError(f"warmup_factor={warmup_factor}: must lie in [0, 1].")
    if not 0 <= min_factor < 1:
        raise ValueError(f"min_factor={min_factor}: must lie in [0, 1).")
    decay: ParamScheduler = PolynomialDecayParamScheduler(base_value=1.0 - min_factor, power=power)
    if min_factor > 0:
        decay = _Raised(decay, min_factor)
    if warmup_iters == 0:
        return decay
    return WarmupParamScheduler(decay, warmup_factor, warmup_iters / max_iter)


class _Raised(ParamScheduler):
    """A schedule and a constant."""

    def __init__(self, schedule: ParamScheduler, constant: float) -> None:
        self.schedule = schedule
        self.constant = constant

    def __call__(self, where: float) -> float:
        return self.constant + self.schedule(where)


def optimizer_params(
    model: nn.Module, *, base_lr: float, head_lr_factor: float, **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups in which all but the backbone learn at another rate.

    Args:
        model: with a `backbone`.
        base_lr: learning rate of the backbone.
        head_lr_factor: what it is multiplied by for decoder, projectors and parameters of losses.
        options: of detectron2's `get_default_optimizer_params`.

    Raises:
        ValueError: a factor that is not above 0.
    """
    if not head_lr_factor > 0:
        raise ValueError(f"head_lr_factor={head_lr_factor}: must be above 0.")
    children = dict(model.named_children())
    backbone = children.pop("backbone")
    return [
        *get_default_optimizer_params(backbone, base_lr=base_lr, **options),
        *get_default_optimizer_params(
            nn.ModuleDict(children), base_lr=head_lr_factor * base_lr, **options
        ),
    ]
