"""Helpers that are no fixtures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench.host_reads import HostReads, count_host_reads

from contrast_d2.engine.launch import leave_groups


def run_processes(function: Callable[..., Any], num_processes: int, *args: Any) -> list[Any]:
    """Calls `function(*args)` in several new processes that form one gloo group on the CPU.

    Args:
        function: importable by name, so at the top level of a module. `torch.distributed` tells it
            its rank.
        num_processes: size of the group.
        args: picklable.

    Returns:
        What each rank returned (anything that `torch.save` takes), in the order of ranks.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process raised; carries its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _run_rank, (function, num_processes, folder, args), num_processes, start_method="spawn"
        )
        return [
            torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False)
            for rank in range(num_processes)
        ]


def _run_rank(
    rank: int, function: Callable[..., Any], num_processes: int, folder: str, args: tuple
) -> None:
    torch.set_num_threads(1)
    # Without a resolvable host name gloo finds no address; the loopback is always there.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    # A rendezvous by file, since a port that is free now may be taken when it is used.
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_processes
    )
    try:
        torch.save(function(*args), Path(folder) / f"result_{rank}.pt")
        dist.barrier()
    finally:
        leave_groups()


def running_first(
    code: str, folder: Path, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a process that runs some code before its program.

    So a process can die at a certain point of its work, however busy the machine is.

    Args:
        code: what is run, also by Python processes that the process starts.
        folder: is made, and holds the code.
        environment: of this process by default.
    """
    environment = dict(os.environ if environment is None else environment)
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    paths = [str(folder), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def gpu_waits(step: Callable[[], object]) -> int:
    """How often the host waits for the GPU in the second run of a step; the first one sets up."""
    step()
    return count_host_reads(step, torch.device("cuda")).total()


class HostWaits(HostReads):
    """Also notes copies from the host to a device, which wait unless they are asked not to."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        to_device = name == "to" and any(isinstance(a, torch.device) for a in args)
        created = name in ("as_tensor", "new_tensor", "tensor")
        if created or (to_device and not kwargs.get("non_blocking")):
            self.calls.append(name)
        return super().__torch_function__(func, types, args, kwargs)
