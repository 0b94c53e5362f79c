"""What a job needs beside detectron2's `launch`: checks before it, and what each process does."""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import parent_process
from typing import Any

import detectron2.engine  # noqa: F401  (its `launch` is a module and a function)
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from .stopping import TrainingStopped

# Seconds that a process which fails after another waits to be stopped by its launcher.
_PATIENCE = 30.0


class JobError(Exception):
    """One line for the user, on its way from a process to the launcher that has started it."""


def under_torchrun() -> bool:
    """Whether the processes are there already, as the environment that torchrun sets says."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def check_launch(args: argparse.Namespace) -> None:
    """Checks how many processes are asked for, and where.

    Args:
        args: of `argument_parser`.

    Raises:
        ValueError: more processes than GPUs, machines that cannot find each other, flags that are
            torchrun's to set, or a detectron2 that starts processes on GPUs only.
    """
    if args.num_gpus < 1:
        raise ValueError(f"--num-gpus {args.num_gpus}: needs at least 1.")
    local_size = args.num_gpus
    if under_torchrun():
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        given = (args.num_machines, args.machine_rank, args.dist_url)
        if args.num_gpus not in (1, local_size) or given != (1, 0, "auto"):
            raise ValueError(
                f"torchrun has started {local_size} process(es) here: leave out --num-gpus, "
                "--num-machines, --machine-rank and --dist-url."
            )
    elif not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank {args.machine_rank} with --num-machines {args.num_machines}: ranks "
            f"count from 0 to {args.num_machines - 1}."
        )
    elif args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError(
            "--dist-url auto finds a port on one machine only: give all machines the same "
            "tcp://HOST:PORT, with a name of machine 0, or use torchrun."
        )
    if args.dist_url != "auto" and not args.dist_url.startswith(("tcp://", "file://", "env://")):
        raise ValueError(f"--dist-url {args.dist_url}: write tcp://HOST:PORT, or auto.")
    if torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            raise ValueError(
                f"--num-gpus {local_size}: this machine has {torch.cuda.device_count()}."
            )
    elif args.num_gpus * args.num_machines > 1 and not under_torchrun() and _needs_gpus():
        raise ValueError(
            f"--num-gpus {args.num_gpus}: this detectron2 starts processes on GPUs only, and there "
            "is none. Use torchrun, or tools/install_detectron2.py in an environment without it."
        )


def run_process(main: Callable[..., Any], *args: Any) -> None:
    """Runs `main(*args)` in one of the processes that detectron2's `launch` starts.

    A process ends with its launcher, however that ends. Without a GPU it takes its share of the
    cores, where OMP_NUM_THREADS does not say otherwise.

    Raises:
        JobError: `main` has exited with a line for the user; with several processes.
    """
    launcher = parent_process()
    if launcher is None or comm.get_world_size() == 1:
        main(*args)
        return
    # A thread, and not a signal of the kernel: it works on every system, and as the program may
    # have been started in the background, where some signals are ignored.
    threading.Thread(target=lambda: (launcher.join(), os._exit(1)), daemon=True).start()
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # Without a share of the cores each, the processes wait for one another's threads.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.get_local_size()))
    try:
        main(*args)
    except TrainingStopped:  # which all processes do together
        leave_groups()
        raise
    except BaseException as error:
        if not _is_first_to_fail():
            # What this process met may be a consequence. Its launcher stops it, unless the first
            # failure was on another machine.
            threading.Event().wait(_PATIENCE)
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            raise JobError(_with_rank(error.code)) from None
        raise
    leave_groups()


def tell_failure(error: ProcessRaisedException | ProcessExitedException) -> str:
    """What the launcher says of the process that failed first, of all processes that failed."""
    text = str(error).strip()
    if isinstance(error, ProcessRaisedException) and f"{JobError.__name__}: " in text:
        return text.rpartition(f"{JobError.__name__}: ")[2]
    return f"{text}\nerror: {text.splitlines()[0].strip('- ')}"


def join_torchrun(main: Callable[..., Any], *args: Any, timeout: timedelta) -> None:
    """Runs `main(*args)` in the group of torchrun, which stops the others when a process fails.

    Args:
        main: what to run.
        args: for `main`.
        timeout: the longest wait of a process for another one.
    """
    local_rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if world_size == 1:
        main(*args)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    try:
        _create_local_group(local_size, timeout)
        comm.synchronize()
        record(main)(*args)  # torchrun's report then has the error of the first that fails
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        # The first to fail tells what all may have to tell.
        raise SystemExit(_with_rank(error.code) if _is_first_to_fail() else 1) from None
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


def _is_first_to_fail() -> bool:
    """Whether no process of the job has failed before this one, as their common store knows."""
    try:
        return dist.distributed_c10d._get_default_store().add("contrast_d2/failed", 1) == 1
    except (RuntimeError, ValueError):  # the process that kept it is gone, or there is no group
        return False


def _needs_gpus() -> bool:
    """Whether detectron2's launch is that of an unchanged v0.6."""
    return "cuda is not available" in inspect.getsource(sys.modules["detectron2.engine.launch"])


def _create_local_group(local_size: int, timeout: timedelta) -> None:
    """Tells detectron2 which processes share a machine; v0.6 does so in its own launch only."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
        return
    for first in range(0, comm.get_world_size(), local_size):
        ranks = list(range(first, first + local_size))
        group = dist.new_group(ranks, timeout=timeout)
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def _with_rank(line: str) -> str:
    where = f"rank {comm.get_rank()} of {comm.get_world_size()} on {socket.gethostname()}"
    return f"error: {where}: {line.removeprefix('error: ')}"
