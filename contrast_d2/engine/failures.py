"""What the processes of a job tell of their failures, and which of them was the cause.

When a process dies, the others fail too, at their next collective call, with words about a lost
connection. So every failure is noted, with its place in the order, in the store through which the
processes have found each other; the launchers, one on each machine, read there what came first.
"""

from __future__ import annotations

import json
import signal
import socket
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]


class ProcessFailedError(RuntimeError):
    """A process of a job failed, and the job was stopped; says which one, where and why.

    Attributes:
        traceback: that of the process, "" for a user's mistake and for a process that was killed.
    """

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class Failure(NamedTuple):
    """How a process ended that should not have.

    Attributes:
        order: 0 for the first process that a launcher finds dead without a word, and then 1, 2, ...
            in the order of reports: what dies without a word is never the consequence of a report
            that it has not made.
        rank: of the process.
        host: name of its machine.
        reason: one line, or a few for a user's mistake.
        traceback: "" where there is none.
    """

    order: int
    rank: int
    host: str
    reason: str
    traceback: str


class FailureLog:
    """The failures of a job, in its store.

    Args:
        store: that of the job. It must answer for as long as any process lives.
        world_size: number of processes.
    """

    def __init__(self, store: Store, world_size: int) -> None:
        self._store = store
        self._world_size = world_size

    def is_empty(self) -> bool:
        """Whether nothing has failed so far; no wait."""
        return self._store.add("failures", 0) == 0

    def has(self, rank: int) -> bool:
        """Whether a process's failure is known."""
        return bool(self._read(f"failure/{rank}"))

    def add(self, rank: int, reason: str, traceback: str = "") -> None:
        """Notes a failure, at the end of the order."""
        self._add(Failure(self._store.add("order", 1), rank, host_name(), reason, traceback))

    def add_exception(self, rank: int, error: BaseException) -> None:
        """Notes what ended a process, seen from within it."""
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            self.add(rank, error.code.removeprefix("error: "))
        elif isinstance(error, SystemExit):
            self.add(rank, f"left before its work was done, with exit code {error.code or 0}")
        elif isinstance(error, KeyboardInterrupt):
            self.add(rank, "interrupted, by Ctrl-C or the end of its launcher")
        else:
            lines = str(error).strip().splitlines()
            text = "".join(traceback.format_exception(error))
            self.add(rank, f"{type(error).__name__}: {lines[0] if lines else ''}", text)

    def add_death(self, rank: int, exit_code: int) -> None:
        """Notes a process that was found dead without a word, which is taken for the cause if it is
        the first of its kind."""
        if exit_code < 0:
            reason = f"killed by {_signal_name(-exit_code)}"
            if -exit_code == signal.SIGKILL:
                reason += ", as by the system when memory runs out"
        else:
            reason = f"left before its work was done, with exit code {exit_code}"
        first = self._store.add("deaths", 1) == 1
        order = 0 if first else self._store.add("order", 1)
        self._add(Failure(order, rank, host_name(), reason, ""))

    def cause(self) -> Failure:
        """The first failure of the job, of those that are known."""
        return min(self._all())

    def error(self) -> ProcessFailedError:
        """The first failure in words."""
        failures = self._all()
        cause = min(failures)
        reason = f"rank {cause.rank} of {self._world_size} on {cause.host}: {cause.reason}"
        if "timed out" in reason.lower() or "timeout" in reason.lower():
            known = {failure.rank for failure in failures}
            silent = [rank for rank in range(self._world_size) if rank not in known]
            if silent:
                reason += f"; it waited for {_ranks(silent)}"
        return ProcessFailedError(reason, cause.traceback)

    def _add(self, failure: Failure) -> None:
        # The count goes up last: who sees it finds the entry.
        self._store.set(f"failure/{failure.rank}", json.dumps(failure))
        self._store.add("failures", 1)

    def _all(self) -> list[Failure]:
        texts = [self._read(f"failure/{rank}") for rank in range(self._world_size)]
        return [Failure(*json.loads(text)) for text in texts if text]

    def _read(self, key: str) -> str:
        """A value, "" for none; `get` would wait for one."""
        return self._store.compare_set(key, "", "").decode()


def host_name() -> str:
    """The name of this machine, as users know it."""
    return socket.gethostname()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks))}"
