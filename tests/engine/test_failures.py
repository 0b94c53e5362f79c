"""What is known of a job's failures, and which was the cause."""

from __future__ import annotations

import signal
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from contrast_d2.engine.failures import FailureLog, host_name


@pytest.fixture
def log() -> FailureLog:
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    return FailureLog(store, world_size=4)


def lost_connection() -> RuntimeError:
    return RuntimeError("Connection closed by peer [127.0.0.1]:1234\nmore")


def test_the_first_report_is_the_cause(log: FailureLog) -> None:
    assert log.is_empty() and not log.has(2)
    log.add_exception(2, KeyError("palette"))
    log.add_exception(0, lost_connection())
    assert not log.is_empty() and log.has(2) and not log.has(1)
    assert log.cause().rank == 2
    error = log.error()
    assert str(error) == f"rank 2 of 4 on {host_name()}: KeyError: 'palette'"
    assert error.traceback.endswith("KeyError: 'palette'\n")


def test_a_death_without_a_word_comes_before_what_it_caused(log: FailureLog) -> None:
    log.add_exception(0, lost_connection())
    log.add_death(3, -signal.SIGKILL)
    log.add_death(1, -signal.SIGABRT)  # of what gloo does about it
    assert "rank 3 of 4" in str(log.error())
    assert "killed by SIGKILL, as by the system when memory runs out" in str(log.error())
    assert log.error().traceback == ""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit("error: x.png is missing."), "x.png is missing."),
        (SystemExit(0), "left before its work was done, with exit code 0"),
        (SystemExit(3), "left before its work was done, with exit code 3"),
        (KeyboardInterrupt(), "interrupted, by Ctrl-C or the end of its launcher"),
        (ValueError(), "ValueError: "),
        (lost_connection(), "RuntimeError: Connection closed by peer [127.0.0.1]:1234"),
    ],
)
def test_an_end_gets_one_line(log: FailureLog, error: BaseException, reason: str) -> None:
    log.add_exception(1, error)
    assert log.cause().reason == reason
    assert bool(log.cause().traceback) == isinstance(error, Exception)


def test_exit_codes_get_names(log: FailureLog) -> None:
    log.add_death(0, -signal.SIGSEGV)
    assert log.cause().reason == "killed by SIGSEGV"
    log.add_death(1, 0)
    log.add_death(2, -200)
    reasons = {failure.rank: failure.reason for failure in log._all()}
    assert reasons[1] == "left before its work was done, with exit code 0"
    assert reasons[2] == "killed by signal 200"


def test_a_timeout_names_who_was_waited_for(log: FailureLog) -> None:
    for rank in (0, 3):
        log.add_exception(rank, RuntimeError("Timed out waiting 1800000ms for recv operation"))
    assert str(log.error()).endswith("; it waited for ranks 1, 2")
