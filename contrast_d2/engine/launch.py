"""Starting one process per GPU, or several on a machine without one, and stopping all of them when
one fails."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import record

from .failures import FailureLog, ProcessFailedError, host_name

DEFAULT_TIMEOUT = timedelta(minutes=30)
# Seconds. How often a launcher looks for failures elsewhere; how long processes have to end by
# themselves after a failure, in which the launchers learn of its cause, and how long after SIGTERM;
# how long machine 0 then keeps the store open for the others.
_POLL = 0.5
_GRACE = 1.0
_GRACE_BETWEEN_MACHINES = 3.0
_TERMINATION = 5.0
_FAREWELL = 10.0


class _Job(NamedTuple):
    """What every process of a job knows.

    Attributes:
        num_processes: on each machine.
        num_machines: machines in the job.
        machine_rank: number of this machine.
        host: where the job's store is, on machine 0.
        port: of the store.
        timeout: the longest wait of a collective call.
    """

    num_processes: int
    num_machines: int
    machine_rank: int
    host: str
    port: int
    timeout: timedelta

    @property
    def world_size(self) -> int:
        return self.num_processes * self.num_machines

    @property
    def first_rank(self) -> int:
        """The rank of this machine's first process."""
        return self.machine_rank * self.num_processes


def launch(
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Runs `main(*args)` in every process of a job, over NCCL where there are GPUs and over gloo
    where there are none.

    A process that torchrun has started joins torchrun's group instead.

    When a process raises, is killed or leaves early, the others are stopped, within seconds on all
    machines of the job. What the launcher cannot see, such as a machine that has lost its network,
    ends the job after `timeout`.

    Args:
        main: an importable function.
        num_processes: processes on this machine, one per GPU where there are GPUs; the same number
            on all machines. Under torchrun its number, or 1.
        num_machines: machines in the job, each of which calls this function; 1 under torchrun.
        machine_rank: number of this machine, from 0.
        dist_url: where the processes meet, "tcp://HOST:PORT" with HOST a name of machine 0; "auto"
            picks a free port, on one machine.
        args: for `main`.
        timeout: the longest that a process waits for another one, to start or in a collective call.

    Raises:
        ValueError: a number of processes or machines that is not to be had, an address that cannot
            be used, or launches or a torchrun that contradict each other.
        ProcessFailedError: a process failed; with several processes.
    """
    if timeout <= timedelta(0):
        raise ValueError(
            f"train.timeout_minutes={timeout.total_seconds() / 60:g}: must be above 0."
        )
    if num_processes < 1:
        raise ValueError(f"--num-gpus {num_processes}: needs at least 1.")
    if _is_under_torchrun():
        _check_torchrun(num_processes, num_machines, machine_rank, dist_url)
        _join_torchrun(main, args, timeout)
        return
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank {machine_rank} with --num-machines {num_machines}: ranks count from 0 "
            f"to {num_machines - 1}."
        )
    if num_machines > 1 and dist_url == "auto":
        raise ValueError(
            "--dist-url auto finds a port on one machine only: give all machines the same "
            "tcp://HOST:PORT, with a name of machine 0."
        )
    _check_gpus(num_processes)
    if num_processes * num_machines == 1:
        main(*args)
        return
    host, port = ("127.0.0.1", 0) if dist_url == "auto" else _address(dist_url)
    job = _Job(num_processes, num_machines, machine_rank, host, port, timeout)
    store = _open_store(job)
    job = job._replace(port=store.port)
    if num_machines > 1:
        _check_machines(job, store)
    context = mp.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        _worker, (job, main, args), num_processes, join=False, start_method="spawn"
    )
    try:
        _watch(context.processes, job, store)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
    finally:
        _stop(context.processes)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]


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


def _address(dist_url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(dist_url)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number
        host = port = None
    if host is None or not port or parts.scheme != "tcp":
        raise ValueError(f"--dist-url {dist_url}: write tcp://HOST:PORT, or auto on one machine.")
    return host, port


def _check_gpus(num_processes: int) -> None:
    """One process per GPU; without GPUs as many as one likes."""
    if torch.cuda.is_available() and num_processes > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {num_processes}: this machine has {torch.cuda.device_count()}."
        )


def _open_store(job: _Job) -> TCPStore:
    """The store in which processes find each other and note failures. The launcher of machine 0
    holds it, and not its first process, so that it outlives any process."""
    try:
        return TCPStore(
            job.host,
            job.port,
            is_master=job.machine_rank == 0,
            timeout=job.timeout,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        url = f"--dist-url tcp://{job.host}:{job.port}"
        if job.machine_rank == 0:
            raise ValueError(
                f"{url} cannot be opened here, on machine 0: the port is taken, or not to be had. "
                f"Choose another one on all machines. ({_first_line(error)})"
            ) from error
        raise ValueError(
            f"{url}: machine 0 did not answer within {job.timeout.total_seconds() / 60:g} minutes. "
            f"Start it with --machine-rank 0, and look at name, port and firewall. "
            f"({_first_line(error)})"
        ) from error


def _check_machines(job: _Job, store: TCPStore) -> None:
    """Compares this launch with those of the other machines, which would wait for ever for ranks
    that nobody has."""
    mine = f"--num-gpus {job.num_processes} --num-machines {job.num_machines}"
    mistake = ""
    theirs = store.compare_set("job", "", mine).decode()
    if theirs != mine:
        mistake = f"{mine} here, but {theirs} on another machine: give all of them the same."
    elif store.add(f"machine/{job.machine_rank}", 1) > 1:
        mistake = (
            f"--machine-rank {job.machine_rank}: another launch has this number. Give each of the "
            f"{job.num_machines} machines one of its own."
        )
    if mistake:
        FailureLog(store, job.world_size).add(job.first_rank, mistake)
        raise ValueError(mistake)


def _worker(local_rank: int, job: _Job, main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What a started process does."""
    rank = job.first_rank + local_rank
    store = TCPStore(job.host, job.port, is_master=False, timeout=job.timeout)
    log = FailureLog(store, job.world_size)
    try:
        _set_up_process(local_rank, job.num_processes)
        # The group has a connection of its own: its threads may use it at any time.
        group_store = TCPStore(job.host, job.port, is_master=False, timeout=job.timeout)
        dist.init_process_group(
            _backend(),
            store=PrefixStore("group", group_store),
            world_size=job.world_size,
            rank=rank,
            timeout=job.timeout,
        )
        _create_local_group(job.num_processes, job.num_machines, job.machine_rank, job.timeout)
        comm.synchronize()
        main(*args)
    except BaseException as error:
        with suppress(RuntimeError):  # where the launcher is gone there is nobody to tell
            # Before the connections to the others close, so that their failures come after this.
            log.add_exception(rank, error)
        sys.exit(1)  # the launcher says the rest
    finally:
        leave_groups()
    store.set(f"done/{rank}", "1")


def _set_up_process(local_rank: int, num_processes: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Without a share of the cores each, the processes wait for one another's threads.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _create_local_group(
    num_processes: int, num_machines: int, machine_rank: int, timeout: timedelta
) -> None:
    """Tells detectron2 which processes share a machine; v0.6 does so in its own launch only."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes)
        return
    for machine in range(num_machines):
        ranks = range(machine * num_processes, (machine + 1) * num_processes)
        group = dist.new_group(list(ranks), timeout=timeout)
        if machine == machine_rank:
            comm._LOCAL_PROCESS_GROUP = group


def _watch(processes: Sequence[BaseProcess], job: _Job, store: TCPStore) -> None:
    """Waits until the processes of all machines are done.

    Raises:
        ProcessFailedError: one is not, anywhere in the job; or machine 0 no longer answers.
    """
    log = FailureLog(store, job.world_size)
    try:
        while log.is_empty() and _are_at_work(processes, job, store):
            running = [process.sentinel for process in processes if process.is_alive()]
            if running:
                wait(running, timeout=_POLL)
            else:
                time.sleep(_POLL)
            _note_deaths(processes, job, store, log)
        _note_deaths(processes, job, store, log)  # of one that has just ended
        if log.is_empty():
            _leave(job, store)
            return
        several = job.num_machines > 1
        end = time.monotonic() + (_GRACE_BETWEEN_MACHINES if several else _GRACE)
        # On several machines the cause may be known to another launcher, and not yet noted.
        while time.monotonic() < end and (several or any(p.is_alive() for p in processes)):
            time.sleep(_POLL / 10)
            _note_deaths(processes, job, store, log)
        error = log.error()
        _stop(processes)
        _leave(job, store)
    except RuntimeError as lost:
        raise ProcessFailedError(
            f"the launcher of machine 0, at tcp://{job.host}:{job.port}, is no longer there: "
            f"{_first_line(lost)}"
        ) from lost
    raise error


def _are_at_work(processes: Sequence[BaseProcess], job: _Job, store: TCPStore) -> bool:
    """Whether this launcher has to wait: for its processes, and on machine 0, which holds the
    store, for the other launchers."""
    if any(process.is_alive() for process in processes):
        return True
    return job.machine_rank == 0 and store.add("left", 0) < job.num_machines - 1


def _note_deaths(
    processes: Sequence[BaseProcess], job: _Job, store: TCPStore, log: FailureLog
) -> None:
    """Notes processes that are gone, neither done nor with a failure of their own."""
    for rank, process in enumerate(processes, start=job.first_rank):
        if process.exitcode is None or log.has(rank):
            continue
        done = store.compare_set(f"done/{rank}", "", "") == b"1"
        if not done or process.exitcode != 0:
            log.add_death(rank, process.exitcode)


def _leave(job: _Job, store: TCPStore) -> None:
    """Tells machine 0 that this launcher needs its store no more; there, waits for all others."""
    if job.machine_rank != 0:
        store.add("left", 1)
        return
    end = time.monotonic() + _FAREWELL
    while store.add("left", 0) < job.num_machines - 1 and time.monotonic() < end:
        time.sleep(_POLL / 10)


def _stop(processes: Sequence[BaseProcess]) -> None:
    """Ends what still runs."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    end = time.monotonic() + _TERMINATION
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _is_under_torchrun() -> bool:
    """Whether somebody has started the processes already, as torchrun does, and says so in the
    environment."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def _check_torchrun(
    num_processes: int, num_machines: int, machine_rank: int, dist_url: str
) -> None:
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    conflicts = []
    if num_processes not in (1, local_size):
        conflicts.append(f"--num-gpus {num_processes}")
    if num_machines != 1:
        conflicts.append(f"--num-machines {num_machines}")
    if machine_rank != 0:
        conflicts.append(f"--machine-rank {machine_rank}")
    if dist_url != "auto":
        conflicts.append(f"--dist-url {dist_url}")
    if conflicts:
        raise ValueError(
            f"{' '.join(conflicts)} under torchrun, which has started {local_size} process(es) "
            f"here and {os.environ['WORLD_SIZE']} in all: leave such flags to torchrun, or start "
            "without it."
        )
    _check_gpus(local_size)


def _join_torchrun(main: Callable[..., Any], args: tuple[Any, ...], timeout: timedelta) -> None:
    """Runs `main` in the group of torchrun, which stops the others when this process fails."""
    local_rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    if world_size == 1:
        main(*args)
        return
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    dist.init_process_group(_backend(), timeout=timeout)
    rank = dist.get_rank()
    try:
        _create_local_group(local_size, world_size // local_size, rank // local_size, timeout)
        comm.synchronize()
        # torchrun's report then has the error of the process that failed first.
        record(main)(*args)
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        where = f"rank {rank} of {world_size} on {host_name()}"
        raise SystemExit(f"error: {where}: {error.code.removeprefix('error: ')}") from error
    finally:
        leave_groups()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
