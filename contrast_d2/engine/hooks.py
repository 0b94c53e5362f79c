"""Training hooks missing from detectron2."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import Tensor, nn
from torch.optim import SGD

from ..files import stop_when_disk_is_full, write_durably
from ..segmentor import inference_state_dict
from .checkpoint import Checkpointer, training_checkpoints
from .device import update

# Over so many values detectron2's writers take a scalar's median.
_WINDOW = 20
# What a clock says is not part of the state of a run.
_TIMES = ("time", "data_time", "eta_seconds")

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """detectron2's hook, which on a resume also counts the checkpoints that the run has already,
    and writes one where the training stops on request."""

    def before_train(self) -> None:
        super().before_train()
        # Later ones, which a kill can leave before `last_checkpoint` names them, come again.
        last = os.path.join(
            self.checkpointer.save_dir, f"model_{self.trainer.start_iter - 1:07d}.pth"
        )
        written = training_checkpoints(self.checkpointer.save_dir)
        self.recent_checkpoints = [path for path in written if path <= last]

    def after_step(self) -> None:
        if self.trainer.stops:  # pyright: ignore[reportAttributeAccessIssue]
            self.period = 1  # and it is the last
        super().after_step()


class BestCheckpointer(HookBase):
    """Keeps the weights of the best evaluation in `model_best.pth`.

    Runs after the hook that evaluates. Unlike
    detectron2's it remembers the best value over `--resume`, and does not make the best checkpoint
    the one that `--resume` starts from.

    Args:
        checkpointer: writes the file.
        metric: name under which the evaluation is stored, e.g. "sem_seg/mIoU"; larger is better.
        period: of the evaluation, in iterations; 0 for one at the end only.
        evaluated: puts those weights into the model that were evaluated, where they are not its
            own, for as long as the file is written.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        metric: str,
        period: int,
        evaluated: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._checkpointer = checkpointer
        self._metric = metric
        self._period = period
        self._evaluated = evaluated
        self.best: float | None = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._check()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not when a failure ended the training
            self._check()

    def _check(self) -> None:
        if not comm.is_main_process():
            return
        latest = self.trainer.storage.latest().get(self._metric)
        if latest is None:
            known = sorted(name for name in self.trainer.storage.latest() if "/" in name)
            logger.warning("no metric %r to choose the best by; there are %s", self._metric, known)
            return
        value, iteration = latest
        if math.isfinite(value) and (self.best is None or value > self.best):
            self.best = value
            logger.info("Best %s so far: %.4f", self._metric, value)
            with self._evaluated():
                self._checkpointer.save("model_best", is_last=False, iteration=iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class WeightAverage(HookBase):
    """An exponential moving average of the weights, to be evaluated in their place.

    After the first step it is a copy of the weights; after each further step
    average <- decay * average + (1 - decay) * weights. A step that the trainer skips leaves it as
    it is. Counters, such as those of batch norm, are copied. It holds what a model has at test
    time: no memory bank, no projector.

    Args:
        model: whose weights are averaged.
        decay: between 0 and 1, both excluded; the average spans about 1 / (1 - decay) iterations.

    Raises:
        ValueError: a decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"train.ema_decay={decay}: must lie between 0 and 1, or be None for no average."
            )
        self._model = model
        self._decay = decay
        self.average: dict[str, Tensor] = {}
        self._sgd: SGD | None = None
        self._counters: tuple[list[Tensor], list[Tensor]] = ([], [])

    def after_step(self) -> None:
        if not self.average:
            weights = inference_state_dict(self._model)
            self.average = {name: x.clone() for name, x in weights.items()}
            return
        if self._sgd is None:
            self._sgd = self._as_optimizer()
        update(self._sgd, self.trainer.skipped)  # pyright: ignore[reportAttributeAccessIssue]
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)  # pyright: ignore[reportPrivateImportUsage]

    def _as_optimizer(self) -> SGD:
        """The update as a step of SGD, whose kernel takes all tensors at once and can skip.

        With a weight decay of 1 and the weights as the gradient to ascend, it is
        average - (1 - decay) * (average - weights).
        """
        weights = inference_state_dict(self._model)  # shares their memory
        pairs = [(self.average[name], x) for name, x in weights.items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        for average, x in floats:
            average.grad = x
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._counters = [average for average, _ in counters], [x for _, x in counters]
        return SGD(
            [average for average, _ in floats],
            lr=1 - self._decay,
            weight_decay=1.0,
            maximize=True,
            fused=True,
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Has the average in the model as its weights, as long as the context is open."""
        weights = inference_state_dict(self._model)  # shares their memory
        own = {name: x.clone() for name, x in weights.items()}
        _copy(self.average, weights)
        try:
            yield
        finally:
            _copy(own, weights)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        weights, average = inference_state_dict(self._model), state_dict["average"]
        # In the layout of the weights, which may be another one than that of the checkpoint.
        self.average = {n: torch.empty_like(x).copy_(average[n]) for n, x in weights.items()}
        self._sgd = None


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, x in source.items():
        target[name].copy_(x)


class MetricsWriter(hooks.PeriodicWriter):
    """detectron2's hook that writes metrics, whose rows after a resume are those of a whole run.

    The rows are medians over the last iterations, and of what is not written in every iteration
    some may wait for the next row: both are part of its state.

    Args:
        build_writers: opens the writers of the metrics, when the training begins.
        period: in iterations.
        output_dir: folder that the writers write to, for messages.
    """

    def __init__(
        self, build_writers: Callable[[], Sequence[EventWriter]], period: int, output_dir: str
    ) -> None:
        super().__init__([], period)
        self._build_writers = build_writers
        self._output_dir = output_dir
        self._written = -1
        self._resumed: dict[str, Any] = {}

    def before_train(self) -> None:
        """Fills the storage, which begins empty, with what the state held."""
        with stop_when_disk_is_full(self._output_dir):
            if self._resumed and comm.is_main_process():
                keep_metrics_until(os.path.join(self._output_dir, "metrics.json"), self._written)
            self._writers = list(self._build_writers())
        storage = self.trainer.storage
        for name, rows in self._resumed.get("histories", {}).items():
            for value, iteration in rows:
                storage.histories()[name].update(value, iteration)
        for name, (value, iteration, smooth) in self._resumed.get("waiting", {}).items():
            storage.iter = iteration
            storage.put_scalar(name, value, smoothing_hint=smooth)
        storage.iter = self.trainer.iter

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        writes = done % self._period == 0 or done == self.trainer.max_iter
        if writes:
            self.trainer.catch_up()  # pyright: ignore[reportAttributeAccessIssue]
        with stop_when_disk_is_full(self._output_dir):
            super().after_step()
        if writes:
            self._written = self.trainer.iter
            # Which the last writer removes, unless it fails.
            self.trainer.storage.clear_images()
            self.trainer.storage.clear_histograms()

    def after_train(self) -> None:
        with stop_when_disk_is_full(self._output_dir):
            super().after_train()

    def state_dict(self) -> dict[str, Any]:
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        waiting = {
            name: (value, iteration, hints[name])
            for name, (value, iteration) in storage.latest().items()
            if iteration > self._written and name not in _TIMES
        }
        histories = {}
        for name, history in storage.histories().items():
            if name not in _TIMES:
                # The last value of what waits is put into the storage anew, not into its history.
                rows = history.values()[-_WINDOW:]
                histories[name] = rows[:-1] if name in waiting else rows
        return {"written": self._written, "histories": histories, "waiting": waiting}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._written = state_dict["written"]
        self._resumed = state_dict


def keep_metrics_until(path: str, iteration: int) -> None:
    """Drops from a metrics.json the rows that a resumed run writes anew, and torn ones.

    A run that is killed has written metrics of iterations after its last checkpoint, and a kill
    within a row would have the next one continue it.

    Args:
        path: of the file, which need not be there.
        iteration: of the last row when the checkpoint was written that is resumed from.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        lines = file.readlines()
    kept = [line for line in lines if _iteration_of(line) <= iteration]
    if len(kept) < len(lines):
        logger.info("%s: %d rows are written anew", path, len(lines) - len(kept))
        write_durably(path, lambda file: file.writelines(kept))


def _iteration_of(line: bytes) -> float:
    """Of a row of metrics; infinite for a torn one."""
    try:
        return json.loads(line)["iteration"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
