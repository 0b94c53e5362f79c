"""Starting one process per GPU, or several on a machine without one."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm

_TIMEOUT = timedelta(minutes=30)


def launch(
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
) -> None:
    """Runs `main(*args)` in every process of a job: detectron2's launch where there are GPUs, and
    the same over gloo where there are none.

    Args:
        main: an importable function.
        num_processes: processes on this machine, one per GPU where there are GPUs.
        num_machines: machines in the job, each of which calls this function.
        machine_rank: number of this machine, from 0.
        dist_url: address at which the processes meet, e.g. "tcp://127.0.0.1:29500"; "auto" picks a
            free port, on one machine.
        args: for `main`.

    Raises:
        ValueError: a number of processes or machines that is not to be had.
    """
    if num_processes < 1:
        raise ValueError(f"--num-gpus {num_processes}: needs at least 1.")
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank {machine_rank} with --num-machines {num_machines}: ranks count from 0 "
            f"to {num_machines - 1}."
        )
    if num_machines > 1 and dist_url == "auto":
        raise ValueError(
            "--dist-url auto finds a port on one machine only: give all machines the same "
            "tcp://HOST:PORT."
        )
    if torch.cuda.is_available():
        if num_processes > torch.cuda.device_count():
            raise ValueError(
                f"--num-gpus {num_processes}: this machine has {torch.cuda.device_count()}."
            )
        launch_on_gpus(_run, num_processes, num_machines, machine_rank, dist_url, (main, args))
    elif num_processes * num_machines == 1:
        main(*args)
    else:
        if dist_url == "auto":
            dist_url = f"tcp://127.0.0.1:{free_port()}"
        mp.spawn(
            _cpu_worker,
            nprocs=num_processes,
            args=(main, num_processes, num_machines, machine_rank, dist_url, args),
        )


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _cpu_worker(
    local_rank: int,
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    args: tuple[Any, ...],
) -> None:
    # Without a share of the cores each, the processes wait for one another's threads.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    dist.init_process_group(
        "gloo",
        init_method=dist_url,
        world_size=num_processes * num_machines,
        rank=machine_rank * num_processes + local_rank,
        timeout=_TIMEOUT,
    )
    _create_local_group(num_processes, num_machines, machine_rank)
    comm.synchronize()
    _run(main, args)


def _run(main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        main(*args)
    finally:
        leave_groups()


def leave_groups() -> None:
    """Ends the process groups of this process, and the threads that work for them.

    A gloo group ends its threads when its last reference goes. While detectron2 or a model keeps
    one, a thread may still be releasing a tensor when the interpreter shuts down, and then aborts
    the process, after all its work was done.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()
    dist.destroy_process_group()


def _create_local_group(num_processes: int, num_machines: int, machine_rank: int) -> None:
    """Tells detectron2 which processes share a machine; v0.6 does so in its own launch only."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes)
        return
    for machine in range(num_machines):
        ranks = range(machine * num_processes, (machine + 1) * num_processes)
        group = dist.new_group(list(ranks))
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group
