"""The training loop: mixed precision, accumulation, clipping, a stop on what is not finite.

A step waits for nothing on the device: the host reads its numbers while the next one is queued.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase, hooks
from detectron2.utils import comm
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .device import LateNumbers, total_norm, update

Batch = list[dict[str, Any]]

# Values of a metric; the log's estimate of the remaining time looks back so far.
_REMEMBERED = 1000

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# So many steps in a row may be skipped in fp16. Each halves the loss scale, which begins at 2^16.
MOST_SKIPPED = 32

logger = logging.getLogger(__name__)


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient became inf or nan; the weights are those of before the step."""


def autocast(device: torch.device, amp_dtype: str | None) -> torch.autocast:
    """The context in which a model computes in "bf16" or "fp16"; None leaves it as it is.

    Raises:
        ValueError: another type.
    """
    if amp_dtype is not None and amp_dtype not in _AUTOCAST_DTYPES:
        raise ValueError(
            f"train.amp.dtype={amp_dtype!r}: choose one of {sorted(_AUTOCAST_DTYPES)}."
        )
    dtype = None if amp_dtype is None else _AUTOCAST_DTYPES[amp_dtype]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(frozen=True)
class _Step:
    """A step whose numbers are on their way to the host.

    Attributes:
        iteration: of the step.
        images: names of the images, by batch.
        rates: learning rates.
        losses, statistics: their names.
        numbers: losses by batch, their means over batches and processes, statistics by batch, the
            norm of the gradient, and the loss scale.
    """

    iteration: int
    images: list[list[str]]
    rates: list[float]
    losses: list[str]
    statistics: list[str]
    numbers: LateNumbers


class Trainer(TrainerBase):
    """Trains a model whose forward returns a dict of losses, which are summed.

    A step depends on nothing but the weights, the state of the optimizer and the number of the
    iteration: random numbers are seeded anew from (seed, iteration, rank) at each step. With a
    data loader that starts at the iteration, a resumed run therefore continues exactly.

    Args:
        model: batch -> losses by name; may be wrapped in DistributedDataParallel. The 0-dim tensors
            by name that it leaves in an attribute `statistics`, if it has one, are logged.
        data_loader: this process's batches, `accumulation_steps` of them per iteration.
        optimizer: of the model's parameters.
        seed: 0 or more.
        amp_dtype: autocast to "bf16" or "fp16", the latter with a loss scaler; None for fp32.
        accumulation_steps: batches whose gradients are averaged for one optimizer step.
        clip_norm: largest 2-norm of the gradient; None for no clipping.
        log_period: iterations from one look at the model's statistics to the next, which are not
            computed in between.

    Attributes:
        last_batch: what the model was run on last, for hooks.
        skipped: 0-dim fp32 on the device, 1 where the last step left the weights as they were.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Batch],
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        amp_dtype: str | None = None,
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        log_period: int = 1,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"train.seed={seed}: needs 0 or more, so that a run can be repeated.")
        if accumulation_steps < 1:
            raise ValueError(f"train.accumulation_steps={accumulation_steps}: needs at least 1.")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(
                f"train.clip_norm={clip_norm}: must be above 0, or None for no clipping."
            )
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.seed = seed
        self.clip_norm = clip_norm
        self.accumulation_steps = accumulation_steps
        self.log_period = log_period
        self.last_batch: Batch = []
        self._device = next(model.parameters()).device
        self._amp_dtype = amp_dtype
        self._autocast = autocast(self._device, amp_dtype)
        # 1 from a step on that is not finite: what is queued after it must not touch the weights.
        self._stopped = torch.zeros((), device=self._device)
        self.skipped = torch.zeros((), device=self._device)
        self._unread: _Step | None = None
        self._skipped_in_a_row = 0
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=amp_dtype == "fp16")

    def train(self, start_iter: int, max_iter: int) -> None:
        """Trains from iteration `start_iter` up to, and without, `max_iter`."""
        # Outside of detectron2's loop, which logs a traceback for what goes wrong in it: data that
        # cannot be loaded are for the user to fix.
        self._batches = iter(self.data_loader)
        loop_logger = logging.getLogger(TrainerBase.__module__)
        loop_logger.addFilter(_tells_a_defect)
        try:
            super().train(start_iter, max_iter)
        finally:
            loop_logger.removeFilter(_tells_a_defect)

    def after_train(self) -> None:
        """Runs the hooks' ends; after a failure without the evaluation of the last iteration."""
        if self.iter < self.max_iter:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        # A resumed run with no step left would count one beyond its last.
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def before_train(self) -> None:
        """Bounds what is remembered of every metric: detectron2 would keep a million values."""
        self.storage._history.default_factory = partial(HistoryBuffer, max_length=_REMEMBERED)
        super().before_train()

    def run_step(self) -> None:
        """One optimizer step."""
        if not self.model.training:
            raise RuntimeError("the model was left in eval mode by a hook: call model.train().")
        torch.manual_seed(_step_seed(self.seed, self.iter, comm.get_rank()))
        self.optimizer.zero_grad(set_to_none=True)
        batches: list[Batch] = []
        losses: list[dict[str, Tensor]] = []
        statistics: list[dict[str, Tensor]] = []
        data_seconds = 0.0
        logged = (self.iter + 1) % self.log_period == 0 or self.iter + 1 == self.max_iter
        for step in range(self.accumulation_steps):
            start = time.perf_counter()
            batch = next(self._batches)
            data_seconds += time.perf_counter() - start
            with self._without_sync(last=step + 1 == self.accumulation_steps):
                batch_losses = self._forward(batch)
                total = sum(batch_losses.values()) / self.accumulation_steps
                self._scaler.scale(total).backward()  # pyright: ignore[reportArgumentType, reportCallIssue]
            batches.append(batch)
            losses.append({name: loss.detach() for name, loss in batch_losses.items()})
            statistics.append(dict(self._statistics()) if logged else {})
        self.last_batch = batch
        self.storage.put_scalars(data_time=data_seconds)
        before, self._unread = self._unread, self._update(batches, losses, statistics)
        if before is not None:
            self._take(before)
        if self.iter + 1 == self.max_iter:
            self.catch_up()

    def catch_up(self) -> None:
        """Waits for the last step, and puts its numbers into the storage.

        Before anything is done with these numbers, or with the weights.

        Raises:
            NonFiniteLossError: a loss or the gradient of the step was not finite.
        """
        if self._unread is not None:
            step, self._unread = self._unread, None
            self._take(step)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        with self._autocast:
            return self.model(batch)

    def _statistics(self) -> Mapping[str, Tensor]:
        """What the model left to be logged of its last batch."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        return getattr(self.model.module if wrapped else self.model, "statistics", {})

    def _without_sync(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over the processes once per step, with the last batch."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _update(
        self,
        batches: list[Batch],
        losses: list[dict[str, Tensor]],
        statistics: list[dict[str, Tensor]],
    ) -> _Step:
        """Updates the weights, unless a loss or the gradient is not finite."""
        by_batch = torch.stack([torch.stack([x.float() for x in row.values()]) for row in losses])
        means = by_batch.mean(dim=0)
        if comm.get_world_size() > 1:
            dist.all_reduce(means)
            means /= comm.get_world_size()
        self._scaler.unscale_(self.optimizer)
        norm = self._clip()
        bad_loss, bad_gradient = ~means.isfinite().all(), ~norm.isfinite()
        # With a loss scaler a gradient that overflows is no failure.
        failed = bad_loss if self._scaler.is_enabled() else bad_loss | bad_gradient
        self._stopped = torch.maximum(self._stopped, failed.float())
        self.skipped = torch.maximum(self._stopped, bad_gradient.float())
        scale = self._scaler.scale(torch.ones((), device=self._device))
        update(self.optimizer, self.skipped)
        self._scaler.update()
        rows = [x for row in statistics for x in row.values()]
        return _Step(
            iteration=self.iter,
            images=[[str(x.get("file_name", "?")) for x in batch] for batch in batches],
            rates=sorted({group["lr"] for group in self.optimizer.param_groups}),
            losses=list(losses[0]),
            statistics=list(statistics[0]),
            numbers=LateNumbers([*by_batch.flatten(), *means, *rows, norm, scale]),  # pyright: ignore[reportArgumentType]
        )

    def _clip(self) -> Tensor:
        """Clips the gradient, where that is wanted; its norm before that."""
        if self.clip_norm is not None:
            return nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        return total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _take(self, step: _Step) -> None:
        """Reads a step's numbers, and stores them under its iteration: the losses averaged over
        batches and processes, their sum, the gradient's norm, and this process's statistics
        averaged over those batches in which they are defined (not nan)."""
        values = np.array(step.numbers.read())
        batches = len(step.images)
        sizes = [batches * len(step.losses), len(step.losses), batches * len(step.statistics)]
        by_batch, means, statistics, (norm, scale) = np.split(values, np.cumsum(sizes))
        if not np.isfinite(means).all():
            raise NonFiniteLossError(self._report(step, by_batch.reshape(batches, -1)))
        metrics = dict(zip(step.losses, means.tolist(), strict=True))
        metrics["total_loss"] = float(means.sum())
        columns = statistics.reshape(batches, -1).T
        looked_at = {
            name: float(np.nanmean(column))
            for name, column in zip(step.statistics, columns, strict=True)
            if not np.isnan(column).all()
        }
        if np.isfinite(norm):
            metrics["grad_norm"] = float(norm)
        now, self.storage.iter = self.storage.iter, step.iteration
        self.storage.put_scalars(**metrics)
        # Of single steps, a period apart.
        self.storage.put_scalars(**looked_at, smoothing_hint=False)
        if self._scaler.is_enabled():
            self.storage.put_scalar("loss_scale", scale, smoothing_hint=False)
        self.storage.iter = now
        self._check_gradient(step, float(norm), float(scale))

    def _check_gradient(self, step: _Step, norm: float, scale: float) -> None:
        """Raises NonFiniteLossError where the gradient is not finite, in fp16 not before the scale
        of the loss has been lowered many times without effect."""
        images = ", ".join(name for names in step.images for name in names)
        if np.isfinite(norm):
            self._skipped_in_a_row = 0
        elif not self._scaler.is_enabled():
            raise NonFiniteLossError(
                f"iteration {step.iteration}: the losses are finite but the gradient's norm is "
                f"{norm}, and training stops before the weights are touched. Images: {images}."
            )
        else:
            self._skipped_in_a_row += 1
            logger.info(
                "iteration %d: the gradient overflows fp16 at a loss scale of %g; the step is "
                "skipped and the scale lowered",
                step.iteration,
                scale,
            )
            if self._skipped_in_a_row == MOST_SKIPPED:
                raise NonFiniteLossError(
                    f"iteration {step.iteration}: the gradient is not finite in {MOST_SKIPPED} "
                    f"steps in a row, at last with a loss scale of {scale:g}, and none of them has "
                    f"touched the weights. Take train.amp.dtype=bf16. Images: {images}."
                )

    def _report(self, step: _Step, by_batch: np.ndarray) -> str:
        """Says which loss terms went wrong, and on which images."""
        bad = ~np.isfinite(by_batch)
        if not bad.any():
            return (
                f"iteration {step.iteration}: a loss is not finite on another process; see its "
                "report."
            )
        rows = [
            f"  {name} = {by_batch[number, i]}"
            + (f" (batch {number} of {len(bad)})" if len(bad) > 1 else "")
            for number in range(len(bad))
            for i, name in enumerate(step.losses)
            if bad[number, i]
        ]
        images = [name for i, names in enumerate(step.images) if bad[i].any() for name in names]
        return "\n".join(
            [
                f"iteration {step.iteration}: the loss is not finite, and training stops before "
                "the weights are touched.",
                *rows,
                f"  images: {', '.join(images)}",
                f"  learning rate {step.rates}, {self._amp_dtype or 'fp32'}",
                "Look at these images and their labels; if they are sound, lower optimizer.lr, set "
                "train.clip_norm, or switch train.amp.enabled off.",
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """State beyond the weights: iteration, hooks, optimizer, loss scaler, seed.

        Raises:
            NonFiniteLossError: the last step was not finite.
        """
        self.catch_up()
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state of another run.

        Raises:
            ValueError: the run had another seed, or had a loss scaler where this one has none.
        """
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"train.seed={self.seed}, but the run to resume has seed {state_dict['seed']}: "
                "resume with that one."
            )
        if bool(state_dict["scaler"]) != self._scaler.is_enabled():
            raise ValueError(
                f"the run to resume was trained {'with' if state_dict['scaler'] else 'without'} "
                "train.amp.dtype=fp16, whose loss scaler is part of its state: resume so."
            )
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        # Fused kernels take tensors of one layout, and that of the checkpoint may be another one.
        for p, state in self.optimizer.state.items():
            for name, x in state.items():
                if isinstance(x, Tensor) and x.dim() and x.shape == p.shape:
                    state[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)
        self._scaler.load_state_dict(state_dict["scaler"])


def _tells_a_defect(record: logging.LogRecord) -> bool:
    """Whether to log it: not the traceback of what the user is told in one line afterwards."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (ValueError, FloatingPointError))


def _step_seed(seed: int, iteration: int, rank: int) -> int:
    """A seed of its own for every step of every process."""
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0])
