"""Learning-rate schedules."""

from __future__ import annotations

from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import ParamScheduler, PolynomialDecayParamScheduler


def poly_schedule(
    *, max_iter: int, power: float = 0.9, warmup_iters: int = 0, warmup_factor: float = 1e-3
) -> ParamScheduler:
    """The multiplier (1 - t / max_iter)^power of the learning rate, with optional linear warm-up.

    Args:
        max_iter: length of the training in iterations.
        power: of the decay; 1 is linear.
        warmup_iters: iterations in which the multiplier rises from `warmup_factor` to the curve.
        warmup_factor: multiplier of iteration 0, with warm-up.

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
    decay = PolynomialDecayParamScheduler(base_value=1.0, power=power)
    if warmup_iters == 0:
        return decay
    return WarmupParamScheduler(decay, warmup_factor, warmup_iters / max_iter)
