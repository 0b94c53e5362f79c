"""The training loop: mixed precision, accumulation, clipping, a stop on non-finite losses."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
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

Batch = list[dict[str, Any]]

# Values of a metric; the log's estimate of the remaining time looks back so far.
_REMEMBERED = 1000

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient became inf or nan; the weights are those of before the step."""


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

    Attributes:
        last_batch: what the model was run on last, for hooks.

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
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"train.seed={seed}: needs 0 or more, so that a run can be repeated.")
        if amp_dtype is not None and amp_dtype not in _AUTOCAST_DTYPES:
            raise ValueError(
                f"train.amp.dtype={amp_dtype!r}: choose one of {sorted(_AUTOCAST_DTYPES)}."
            )
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
        self.last_batch: Batch = []
        self._device = next(model.parameters()).device
        self._dtype = None if amp_dtype is None else _AUTOCAST_DTYPES[amp_dtype]
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
            statistics.append(dict(self._statistics()))
        self.last_batch = batch
        norm = self._clip()
        metrics = self._check_finite(batches, losses, statistics, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.storage.put_scalars(data_time=data_seconds, **metrics)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
            return self.model(batch)

    def _statistics(self) -> dict[str, Tensor]:
        """What the model left to be logged of its last batch."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        return getattr(self.model.module if wrapped else self.model, "statistics", {})

    def _without_sync(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over the processes once per step, with the last batch."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _clip(self) -> Tensor | None:
        """Clips the gradient; its norm before that, or None without clipping."""
        if self.clip_norm is None:
            return None
        self._scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)

    def _check_finite(
        self,
        batches: list[Batch],
        losses: list[dict[str, Tensor]],
        statistics: list[dict[str, Tensor]],
        norm: Tensor | None,
    ) -> dict[str, float]:
        """Brings the losses to the host, in one transfer, before the optimizer may use them.

        Returns:
            The losses averaged over batches and processes, their sum, the gradient's norm, and this
            process's statistics averaged over those batches in which they are defined (not nan).

        Raises:
            NonFiniteLossError: a loss, or with clipping the gradient, is inf or nan.
        """
        names = list(losses[0])
        local = _table(losses)
        mean = local.mean(dim=0)
        if comm.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= comm.get_world_size()
        parts = [local.flatten(), mean, _table(statistics).to(mean.device).flatten()]
        parts += [] if norm is None else [norm.float().view(1)]
        values = np.array(torch.cat(parts).tolist())
        edges = np.cumsum([part.numel() for part in parts])
        by_batch, mean_host, by_statistic, _ = np.split(values, edges[:3])
        by_batch = by_batch.reshape(local.shape)
        if not np.isfinite(mean_host).all():
            raise NonFiniteLossError(self._report(batches, names, by_batch))
        metrics = dict(zip(names, mean_host.tolist(), strict=True))
        metrics["total_loss"] = float(mean_host.sum())
        for name, column in zip(
            statistics[0], by_statistic.reshape(len(batches), -1).T, strict=True
        ):
            if not np.isnan(column).all():
                metrics[name] = float(np.nanmean(column))
        if norm is not None:
            metrics["grad_norm"] = float(values[-1])
            # With a loss scaler such a step is skipped and the scale reduced; that is no failure.
            if not np.isfinite(values[-1]) and not self._scaler.is_enabled():
                raise NonFiniteLossError(
                    f"iteration {self.iter}: the losses are finite but the gradient's norm is "
                    f"{values[-1]}. Images: {_image_names(batches)}."
                )
        return metrics

    def _report(self, batches: list[Batch], names: list[str], by_batch: np.ndarray) -> str:
        """Says which loss terms went wrong, and on which images."""
        bad = ~np.isfinite(by_batch)
        if not bad.any():
            return (
                f"iteration {self.iter}: a loss is not finite on another process; see its report."
            )
        rates = sorted({group["lr"] for group in self.optimizer.param_groups})
        rows = [
            f"  {name} = {by_batch[step, i]}"
            + (f" (batch {step} of {len(batches)})" if len(batches) > 1 else "")
            for step in range(len(batches))
            for i, name in enumerate(names)
            if bad[step, i]
        ]
        images = _image_names([batch for step, batch in enumerate(batches) if bad[step].any()])
        return "\n".join(
            [
                f"iteration {self.iter}: the loss is not finite, and training stops before the "
                "weights are touched.",
                *rows,
                f"  images: {images}",
                f"  learning rate {rates}, {self._dtype or torch.float32}",
                "Look at these images and their labels; if they are sound, lower optimizer.lr, set "
                "train.clip_norm, or switch train.amp.enabled off.",
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """State beyond the weights: iteration, hooks, optimizer, loss scaler, seed."""
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
        self._scaler.load_state_dict(state_dict["scaler"])


def _tells_a_defect(record: logging.LogRecord) -> bool:
    """Whether to log it: not the traceback of what the user is told in one line afterwards."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (ValueError, NonFiniteLossError))


def _table(rows: list[dict[str, Tensor]]) -> Tensor:
    """0-dim tensors by name, of several batches: (batches, names) fp32."""
    if not rows[0]:
        return torch.zeros(len(rows), 0)
    return torch.stack([torch.stack([row[n].float() for n in rows[0]]) for row in rows])


def _step_seed(seed: int, iteration: int, rank: int) -> int:
    """A seed of its own for every step of every process."""
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1, np.uint64)[0])


def _image_names(batches: list[Batch]) -> str:
    names = [str(image.get("file_name", "?")) for batch in batches for image in batch]
    return ", ".join(names)
