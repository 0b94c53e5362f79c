"""The main job on two machines, which here are two launches, and under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .dying import free_port
from .test_train_net import CONFIG, ROOT, SMALL, assert_identical, without_config

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")


def start(output_dir: Path, *before: str, flags: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    arguments = [*before, "train_net.py", "--config-file", CONFIG, *flags, *SMALL]
    return subprocess.Popen(
        [sys.executable, *arguments, "train.max_iter=2", "train.eval_period=0"]
        + [f"train.output_dir={output_dir}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*jobs: subprocess.Popen[str]) -> None:
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors[-3000:]


def assert_the_same(a: Path, b: Path) -> None:
    assert_identical(*(without_config(folder / "model_final.pth") for folder in (a, b)))


@pytest.fixture(scope="module")
def one_launch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run in two processes of one launch."""
    output_dir = tmp_path_factory.mktemp("launch")
    finish(start(output_dir, flags=("--num-gpus", "2")))
    return output_dir


def test_two_machines_train_what_one_does(one_launch: Path, tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    job = ("--num-machines", "2", "--dist-url", url, "--machine-rank")
    finish(*(start(tmp_path, flags=(*job, str(machine))) for machine in (0, 1)))
    assert "Rank of current process: 1. World size: 2" in (tmp_path / "log.txt.rank1").read_text()
    assert_the_same(one_launch, tmp_path)


def test_torchrun_trains_what_a_launch_does(one_launch: Path, tmp_path: Path) -> None:
    finish(start(tmp_path, *TORCHRUN, "2", "--master-port", str(free_port())))
    assert "Rank of current process: 1. World size: 2" in (tmp_path / "log.txt.rank1").read_text()
    assert_the_same(one_launch, tmp_path)


def test_torchrun_on_two_machines(one_launch: Path, tmp_path: Path) -> None:
    job = (*TORCHRUN, "1", "--nnodes", "2", "--master-addr", "127.0.0.1")
    job = (*job, "--master-port", str(free_port()), "--node-rank")
    finish(*(start(tmp_path, *job, str(machine)) for machine in (0, 1)))
    assert_the_same(one_launch, tmp_path)


def test_a_mistake_gets_one_line_of_one_process(tmp_path: Path) -> None:
    """A mistake that both processes find, after they have started."""
    job = start(tmp_path, flags=("--num-gpus", "2", "--eval-only"))
    _, errors = job.communicate()
    assert job.returncode == 1
    lines = [line for line in errors.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and "Traceback" not in errors
    assert lines[0].startswith("error: rank ")
    assert "no weights" in lines[0]
