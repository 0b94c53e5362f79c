"""Jobs for train_net.py's `start`: one that ends well, and one of which a process dies.

    python tests/engine/dying.py JOB FOLDER [FLAG ...]

runs a job with flags of train_net.py.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from datetime import timedelta
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
import train_net  # isort: skip  (which silences the warnings of detectron2 0.6)
import torch
import torch.distributed as dist
from detectron2.utils import comm

TIMEOUT = timedelta(minutes=7)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def report(folder: str, _: Namespace) -> None:
    """Writes what detectron2 knows of this process."""
    gathered = comm.gather(f"hello from {comm.get_rank()}")
    lines = [
        f"{comm.get_rank()} of {comm.get_world_size()}",
        f"local {comm.get_local_rank()} of {comm.get_local_size()}",
        dist.get_backend(),
        str(gathered),
    ]
    Path(folder, str(comm.get_rank())).write_text("\n".join(lines))


def die(how: str, folder: str, _: Namespace) -> None:
    """The last rank dies in one of several ways, while the others go on to wait for it.

    In a job that `waits` all live on; one that `hangs` lost its patience, after all have met.
    """
    total = torch.zeros(1)
    dist.all_reduce(total)
    Path(folder, f"pid{comm.get_rank()}").write_text(str(os.getpid()))
    if how == "mistake":  # which all make
        raise SystemExit("error: x.png is missing.")
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    Path(folder, f"timeout{comm.get_rank()}").write_text(str(backend.options._timeout))
    dist.barrier()
    if comm.get_rank() == comm.get_world_size() - 1:
        if how == "raises":
            raise KeyError("palette")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()
    if how == "hangs":
        backend._set_default_timeout(timedelta(seconds=1))
    while True:
        dist.all_reduce(total)


def command(job: str, folder: Path | str, *flags: str) -> list[str]:
    return [sys.executable, "-W", "ignore", __file__, job, str(folder), *flags]


def start(job: str, folder: Path | str, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """Another process that runs a job."""
    return subprocess.Popen(
        command(job, folder, *flags),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def main() -> None:
    job, folder, *flags = sys.argv[1:]
    args = train_net.argument_parser().parse_args(flags)
    function = partial(report, folder) if job == "report" else partial(die, job, folder)
    with train_net.one_line_errors():
        train_net.check_launch(args)
    train_net.start(function, args, TIMEOUT)


if __name__ == "__main__":
    main()
