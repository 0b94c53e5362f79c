"""Starting processes without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from contrast_d2.engine import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the path without a GPU")


def report(folder: str) -> None:
    """Writes what detectron2 knows of this process."""
    gathered = comm.gather(f"hello from {comm.get_rank()}")
    lines = [
        f"{comm.get_rank()} of {comm.get_world_size()}",
        f"local {comm.get_local_rank()} of {comm.get_local_size()}",
        dist.get_backend(),
        str(gathered),
    ]
    Path(folder, str(comm.get_rank())).write_text("\n".join(lines))


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
    ("arguments", "message"),
    [
        ((0,), "--num-gpus 0"),
        ((1, 2, 2, "tcp://127.0.0.1:1"), "--machine-rank 2 with --num-machines 2"),
        ((1, 2, 0, "auto"), "--dist-url auto"),
    ],
)
def test_impossible_jobs_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(report, *arguments)
