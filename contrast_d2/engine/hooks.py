"""Hooks that detectron2 has not."""

from __future__ import annotations

import logging
import math
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from .checkpoint import Checkpointer

logger = logging.getLogger(__name__)


class BestCheckpointer(HookBase):
    """Keeps the weights of the best evaluation in `model_best.pth`.

    Runs after the hook that evaluates and before the one that writes periodic checkpoints. Unlike
    detectron2's it remembers the best value over `--resume`, and does not make the best checkpoint
    the one that `--resume` starts from.

    Args:
        checkpointer: writes the file.
        metric: name under which the evaluation is stored, e.g. "sem_seg/mIoU"; larger is better.
        period: of the evaluation, in iterations; 0 for one at the end only.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str, period: int) -> None:
        self._checkpointer = checkpointer
        self._metric = metric
        self._period = period
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
            self._checkpointer.save("model_best", is_last=False, iteration=iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
