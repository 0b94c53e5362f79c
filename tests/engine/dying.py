"""Jobs for `launch`: one that ends well, and one of which a process dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


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


def die(how: str, folder: str) -> None:
    """The last rank dies in one of several ways, while the others go on to wait for it."""
    total = torch.zeros(1)
    dist.all_reduce(total)
    if comm.get_rank() == comm.get_world_size() - 1:
        Path(folder, "time").write_text(str(time.time()))
        if how == "raises":
            raise KeyError("palette")
        if how == "mistake":
            raise SystemExit("error: x.png is missing.")
        if how == "leaves":
            os._exit(0)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    while True:
        dist.all_reduce(total)


REASONS = {
    "raises": "KeyError: 'palette'",
    "mistake": "x.png is missing.",
    "leaves": "left before its work was done, with exit code 0",
    "killed": "killed by SIGKILL, as by the system when memory runs out",
}


def start(arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Another process that calls `launch(<arguments>)` of functions of this module, and then writes
    the time: on a busy machine the end of an interpreter takes longer than all else."""
    code = (
        "import sys, time\n"
        "from contrast_d2.engine import ProcessFailedError, launch\n"
        "from tests.engine.dying import die, report\n"
        f"try:\n    launch({arguments})\n"
        "except (ProcessFailedError, ValueError) as error:\n    sys.exit(f'error: {error}')\n"
        "finally:\n    print(time.time())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
