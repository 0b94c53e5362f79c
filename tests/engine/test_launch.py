"""Starting processes without a GPU, and what becomes of them when one of them dies."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from contrast_d2.engine import check_launch, tell_failure

from .dying import ROOT, TIMEOUT, command, free_port, start

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the path without a GPU")


def test_two_processes_know_each_other(tmp_path: Path) -> None:
    job = start("report", tmp_path, "--num-gpus", "2")
    _, errors = job.communicate()
    assert job.returncode == 0, errors
    assert (tmp_path / "0").read_text().splitlines() == [
        "0 of 2",
        "local 0 of 2",
        "gloo",
        "['hello from 0', 'hello from 1']",
    ]
    assert (tmp_path / "1").read_text().splitlines()[:2] == ["1 of 2", "local 1 of 2"]


def here(rank: int) -> str:
    return f"error: rank {rank} of 2 on {socket.gethostname()}: "


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "error: process 1 terminated"),
        pytest.param("raises", "error: Process 1 terminated", marks=pytest.mark.slow),
        pytest.param("mistake", here(0) + "x.png is missing.", marks=pytest.mark.slow),
        pytest.param("hangs", "error: Process 0 terminated", marks=pytest.mark.slow),
    ],
)
def test_when_a_process_dies_all_end_and_it_is_named(
    tmp_path: Path, how: str, message: str
) -> None:
    job = start(how, tmp_path, "--num-gpus", "2")
    _, errors = job.communicate()
    assert job.returncode == 1
    last = errors.strip().splitlines()[-1]
    # Of a mistake that all make, either may be the first to tell.
    assert last.replace("rank 1 of", "rank 0 of").startswith(message)
    assert ("KeyError: 'palette'" in errors) == (how == "raises")
    assert ("Traceback" in errors) == (how in ("raises", "hangs"))
    for rank in (0, 1):
        assert not runs(int((tmp_path / f"pid{rank}").read_text()))
        if how != "mistake":
            assert (tmp_path / f"timeout{rank}").read_text() == str(TIMEOUT)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended; its parent may be slow to ask for its status.
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.strip().startswith("Z")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_processes_end_with_their_launcher(tmp_path: Path, number: signal.Signals) -> None:
    """Also where it was started in the background, in which a shell has SIGINT ignored."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as nohup does it, and so by all children")
    line = " ".join(command("waits", tmp_path, "--num-gpus", "2"))
    shell = subprocess.run(
        ["sh", "-c", f"{line} >/dev/null 2>&1 & echo $!"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    launcher = int(shell.stdout)
    files = [tmp_path / f"{name}{rank}" for name in ("pid", "timeout") for rank in (0, 1)]
    wait_until(lambda: all(file.exists() for file in files))  # the first two are complete by then
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    assert all(map(runs, pids))
    os.kill(launcher, number)
    wait_until(lambda: not any(map(runs, [launcher, *pids])))


def wait_until(condition) -> None:
    """Waits for what takes as long as the machine is busy; pytest's time limit ends it."""
    while not condition():
        time.sleep(0.05)


@pytest.mark.slow
def test_two_machines_know_each_other(tmp_path: Path) -> None:
    job = ("--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--machine-rank")
    machines = [start("report", tmp_path, *job, str(m)) for m in (1, 0)]
    assert [machine.wait() for machine in machines] == [0, 0]
    for rank in (0, 1):
        lines = (tmp_path / str(rank)).read_text().splitlines()
        assert lines[:2] == [f"{rank} of 2", "local 0 of 1"]


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


@pytest.mark.slow
def test_processes_of_torchrun_join_its_group(tmp_path: Path) -> None:
    port = free_port()
    ranks = [start("report", tmp_path, **torchrun_environment(rank, port)) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert (tmp_path / "0").read_text().splitlines()[-1] == "['hello from 0', 'hello from 1']"
    assert (tmp_path / "1").read_text().splitlines()[:2] == ["1 of 2", "local 1 of 2"]


@pytest.mark.slow
def test_under_torchrun_a_mistake_of_all_is_told_once(tmp_path: Path) -> None:
    port = free_port()
    ranks = [start("mistake", tmp_path, **torchrun_environment(rank, port)) for rank in (0, 1)]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    lines = [line for text in errors for line in text.splitlines() if "x.png" in line]
    assert lines in ([here(0) + "x.png is missing."], [here(1) + "x.png is missing."])


def flags(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto") -> Namespace:
    return Namespace(
        num_gpus=num_gpus, num_machines=num_machines, machine_rank=machine_rank, dist_url=dist_url
    )


def test_flags_against_torchrun_are_refused(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for given in [
        {"num_gpus": 4},
        {"num_machines": 2},
        {"machine_rank": 1},
        {"dist_url": "tcp://a:1"},
    ]:
        with subtests.test(given=given):
            for name, value in torchrun_environment(rank=0, port=1).items():
                monkeypatch.setenv(name, value)
            check_launch(flags(num_gpus=2))
            with pytest.raises(ValueError, match="torchrun.* 2 "):
                check_launch(flags(**given))


def test_impossible_jobs_are_refused(subtests: pytest.Subtests) -> None:
    for given, message in [
        ({"num_gpus": 0}, "--num-gpus 0"),
        ({"num_machines": 2, "machine_rank": 2}, "--machine-rank 2 with --num-machines 2"),
        ({"num_machines": 2}, "--dist-url auto"),
    ]:
        with subtests.test(given=given):
            with pytest.raises(ValueError, match=message):
                check_launch(flags(**given))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_launch(flags(num_gpus=2))
    with pytest.raises(ValueError, match="--num-gpus 3.* 2"):
        check_launch(flags(num_gpus=3))


def test_a_detectron2_that_needs_gpus_is_told_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch(flags(num_gpus=2))
    original = 'assert torch.cuda.is_available(), "cuda is not available. Please check ..."'
    monkeypatch.setattr(inspect, "getsource", lambda module: original)
    check_launch(flags(num_gpus=1))
    with pytest.raises(ValueError, match="--num-gpus 2.*torchrun"):
        check_launch(flags(num_gpus=2))


def test_a_line_of_several_reaches_the_user_whole() -> None:
    line = "error: rank 1 of 2 on here: iteration 3: not finite.\n  loss = nan\nLook at them."
    text = (
        f"-- Process 1 terminated with the following error:\nTraceback: ...\nx.JobError: {line}\n"
    )
    assert tell_failure(torch.multiprocessing.ProcessRaisedException(text, 1, 2)) == line
