"""Ending a training on request, with a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

# Exit status of a training that has stopped on request and can be continued with --resume: the one
# that means "try again" in sysexits.h.
STOPPED = 75

# What schedulers send before they take a machine away. Not on all systems.
_OF_SCHEDULERS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class TrainingStopped(SystemExit):
    """A training has ended on request, after a checkpoint."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class AfterCheckpoint(HookBase):
    """Stands between the hooks whose doing a checkpoint holds, and those of the same iteration that
    come after it: the evaluation, the choice of the best weights, the metrics.

    Where a run resumes it has these make up for what they have not done, so that an evaluation can
    fail or be killed and costs no training. Where a stop is requested it ends the training.

    Raises:
        TrainingStopped: in all processes, once the checkpoint is written.
    """

    def before_step(self) -> None:
        trainer: Any = self.trainer
        start = trainer.start_iter
        if start == 0 or trainer.iter != start:
            return
        hooks = trainer._hooks
        own = next(i for i, hook in enumerate(hooks) if hook is self)
        trainer.iter = trainer.storage.iter = start - 1
        for hook in hooks[own + 1 :]:
            hook.after_step()
        trainer.iter = trainer.storage.iter = start

    def after_step(self) -> None:
        if self.trainer.stops:  # pyright: ignore[reportAttributeAccessIssue]
            comm.synchronize()
            raise TrainingStopped


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Has SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop, instead of ending the process.

    Args:
        stop: asks for it.
    """

    def ask(number: int, _: FrameType | None) -> None:
        stop()
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # the second one ends it at once

    with _handling([*_OF_SCHEDULERS, signal.SIGINT], ask):
        yield


@contextmanager
def passing_on_signals() -> Iterator[None]:
    """Has a launcher pass SIGTERM, SIGUSR1 and the first Ctrl-C on to the processes that it has
    started, and wait for them.

    A terminal sends Ctrl-C to them as well: they get SIGTERM, of which a second one does nothing.
    """

    def pass_on(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    with _handling([*_OF_SCHEDULERS, signal.SIGINT], pass_on):
        yield


@contextmanager
def _handling(
    numbers: list[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Has a handler for signals that are not ignored, as nohup and shells have some of them."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows none
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: x for number, x in before.items() if x is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, x in before.items():
            signal.signal(number, x)
