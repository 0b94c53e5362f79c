"""Starting processes without a GPU, and stopping them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from contrast_d2.engine import ProcessFailedError, launch
from contrast_d2.engine.failures import host_name

from .dying import REASONS, die, free_port, report, start

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the path without a GPU")

# Seconds from the death of a process to the end of its launch: what the launcher allows for.
BOUND, BOUND_BETWEEN_MACHINES = 7.0, 20.0


def test_two_processes_know_each_other(tmp_path: Path) -> None:
    launch(report, 2, dist_url="auto", args=(str(tmp_path),))
    assert (tmp_path / "0").read_text().splitlines() == [
        "0 of 2",
        "local 0 of 2",
        "gloo",
        "['hello from 0', 'hello from 1']",
    ]
    assert (tmp_path / "1").read_text().splitlines()[:2] == ["1 of 2", "local 1 of 2"]


def test_one_process_runs_here(tmp_path: Path) -> None:
    calls: list[int] = []
    launch(calls.append, 1, args=(3,))
    assert calls == [3]


@pytest.mark.parametrize(
    "how",
    [
        "raises",
        "killed",
        pytest.param("leaves", marks=pytest.mark.slow),
        pytest.param("mistake", marks=pytest.mark.slow),
    ],
)
def test_when_a_process_dies_all_stop_and_it_is_named(tmp_path: Path, how: str) -> None:
    with pytest.raises(ProcessFailedError) as caught:
        launch(die, 2, args=(how, str(tmp_path)))
    assert time.time() - float((tmp_path / "time").read_text()) < BOUND
    assert str(caught.value) == f"rank 1 of 2 on {host_name()}: {REASONS[how]}"
    assert ("in die" in caught.value.traceback) == (how == "raises")


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailedError, match=r"rank 0 of 2 on .*: RuntimeError: .*rank 1$"):
        launch(die, 2, args=("hangs", str(tmp_path)), timeout=timedelta(seconds=4))
    assert time.time() - float((tmp_path / "time").read_text()) < 4 + BOUND


@pytest.mark.slow
def test_two_machines_know_each_other(tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    machines = [start(f"report, 1, 2, {m}, {url!r}, ({str(tmp_path)!r},)") for m in (1, 0)]
    assert [machine.wait(timeout=500) for machine in machines] == [0, 0]
    for rank in (0, 1):
        lines = (tmp_path / str(rank)).read_text().splitlines()
        assert lines[:2] == [f"{rank} of 2", "local 0 of 1"]


@pytest.mark.slow
def test_a_death_on_one_machine_is_told_on_all(tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    machines = [start(f"die, 1, 2, {m}, {url!r}, ('killed', {str(tmp_path)!r})") for m in (0, 1)]
    for machine in machines:
        ended, errors = machine.communicate(timeout=500)
        assert machine.returncode == 1
        line = f"error: rank 1 of 2 on {host_name()}: {REASONS['killed']}"
        assert errors.strip().splitlines()[-1] == line
        died = float((tmp_path / "time").read_text())
        assert float(ended) - died < BOUND_BETWEEN_MACHINES


@pytest.mark.slow
def test_machines_stop_when_the_first_launcher_is_killed(tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    machines = [start(f"die, 1, 2, {m}, {url!r}, ('hangs', {str(tmp_path)!r})") for m in (0, 1)]
    while not (tmp_path / "time").exists():
        time.sleep(0.1)
    machines[0].kill()
    killed = time.time()
    ended, errors = machines[1].communicate(timeout=500)
    assert machines[1].returncode == 1 and float(ended) - killed < BOUND_BETWEEN_MACHINES
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"error: the launcher of machine 0, at {url}, is no longer there")
    machines[0].communicate()


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchrun_environment(rank=0, port=1).items():
        monkeypatch.setenv(name, value)


def torchrun_environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun --nproc-per-node 2 tells its processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def test_processes_of_torchrun_join_its_group(tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        start(f"report, 1, args=({str(tmp_path)!r},)", **torchrun_environment(rank, port))
        for rank in (0, 1)
    ]
    assert [rank.wait(timeout=500) for rank in ranks] == [0, 0]
    assert (tmp_path / "0").read_text().splitlines()[-1] == "['hello from 0', 'hello from 1']"
    assert (tmp_path / "1").read_text().splitlines()[:2] == ["1 of 2", "local 1 of 2"]


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ((4,), "--num-gpus 4"),
        ((1, 2), "--num-machines 2"),
        ((2, 1, 1), "--machine-rank 1"),
        ((1, 1, 0, "tcp://a:1"), "--dist-url tcp://a:1"),
    ],
)
def test_flags_against_torchrun_are_refused(arguments: tuple, flag: str) -> None:
    with pytest.raises(ValueError, match=rf"^{flag} under torchrun, which has started 2 process"):
        launch(report, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "--num-gpus 0"),
        ((1, 2, 2, "tcp://127.0.0.1:1"), "--machine-rank 2 with --num-machines 2"),
        ((1, 2, 0, "auto"), "--dist-url auto"),
        ((2, 1, 0, "file:///tmp/x"), "--dist-url file:///tmp/x: write tcp://HOST:PORT"),
        ((2, 1, 0, "tcp://127.0.0.1"), "--dist-url tcp://127.0.0.1: write"),
        ((2, 1, 0, "tcp://127.0.0.1:port"), "--dist-url tcp://127.0.0.1:port: write"),
        ((1, 1, 0, "auto", (), timedelta(0)), "train.timeout_minutes=0: must be above 0"),
    ],
)
def test_impossible_jobs_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(report, *arguments)


@pytest.fixture
def store() -> Iterator[TCPStore]:
    """The store of a job whose machine 0 was launched with --num-gpus 1 --num-machines 3."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    store.set("job", "--num-gpus 1 --num-machines 3")
    store.add("machine/1", 1)
    yield store


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 3, 2), "--num-gpus 2 --num-machines 3 here, but --num-gpus 1 --num-machines 3 on"),
        ((1, 3, 1), "--machine-rank 1: another launch has this number. Give each of the 3"),
    ],
)
def test_launches_that_contradict_each_other_are_refused(
    store: TCPStore, arguments: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        launch(report, *arguments, f"tcp://127.0.0.1:{store.port}")
    assert store.add("failures", 0) == 1  # the others are told


def test_a_port_that_is_taken_is_named(store: TCPStore) -> None:
    url = f"tcp://127.0.0.1:{store.port}"
    with pytest.raises(ValueError, match=f"--dist-url {url} cannot be opened here, on machine 0"):
        launch(report, 1, 2, 0, url)


def test_a_machine_0_that_does_not_answer_is_named() -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=f"{url}: machine 0 did not answer within 0.02 minutes"):
        launch(report, 1, 2, 1, url, timeout=timedelta(seconds=1.2))
