"""GPUs, memory and disks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .finding import ERROR, NOTE, OK, Answer, Finding, one_line, pinned, pip

_GIB = 2**30
# Of free disk space: what a full run of checkpoints of a large network takes, and what a single
# one does not fit into.
_FEW_BYTES, _NO_BYTES = 5 * _GIB, _GIB // 2
# Batches of large crops wait in shared memory; containers have 64 MiB of it unless told otherwise.
_SHARED_BYTES = _GIB

# Where downloads and compiled kernels are kept: variable, and the folder where it is not set.
_CACHES = {
    "HF_HOME": "~/.cache/huggingface",
    "TORCH_HOME": "~/.cache/torch",
    "FVCORE_CACHE": "~/.torch/iopath_cache",
    "TRITON_CACHE_DIR": "~/.triton",
}


def nvidia_gpus() -> list[str]:
    """What the driver says of NVIDIA's GPUs: a line of name, driver and memory for each."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def check_gpus(answer: Answer, seen_by_driver: list[str]) -> Iterator[Finding]:
    """Whether torch can use the GPUs that are there.

    Args:
        answer: of `software.PROBE`.
        seen_by_driver: of `nvidia_gpus`.
    """
    if answer.error is not None:
        return
    facts = answer.values
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else "the CPU"
    build = f"ROCm {facts['rocm']}" if facts["rocm"] else build
    pair = pip("install", "--force-reinstall", *pinned("torch", "torchvision"))
    for gpu in facts["gpus"]:
        if gpu["error"]:
            text = f"{gpu['name']} cannot run this torch for {build}: {one_line(gpu['error'])}."
            yield Finding("gpu", ERROR, text, pair)
        else:
            text = (
                f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}."
            )
            yield Finding("gpu", OK, text)
    if facts["gpus"]:
        return
    if not seen_by_driver:
        text = f"no GPU: torch, built for {build}, runs on the CPU."
        yield Finding("gpu", NOTE, text)
        return
    there = one_line(seen_by_driver[0])
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if facts["cuda"] is None:
        text = f"torch is built for {build} and does not use the GPU ({there})."
        yield Finding("gpu", NOTE, text, pair)
    elif hidden is not None and (not hidden.strip() or hidden.strip().startswith("-")):
        text = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU ({there})."
        yield Finding("gpu", NOTE, text, "unset CUDA_VISIBLE_DEVICES")
    else:
        reason = one_line((facts["warnings"] or ["it does not say why"])[-1])
        text = (
            f"torch for {build} finds no GPU, though the driver does ({there}): {reason}. Update "
            "the driver, or install a torch for an older CUDA."
        )
        yield Finding("gpu", ERROR, text, "nvidia-smi")


def check_disks(folder: str) -> Iterator[Finding]:
    """Free space where runs are written, shared memory, and folders of caches.

    Args:
        folder: where runs are written.
    """
    free = shutil.disk_usage(folder).free
    state = ERROR if free < _NO_BYTES else NOTE if free < _FEW_BYTES else OK
    text = f"{free / _GIB:.1f} GiB free for runs in {os.path.abspath(folder)}."
    yield Finding("disk", state, text, None if state == OK else "df -h")
    if not os.access(folder, os.W_OK):
        text = f"{os.path.abspath(folder)} cannot be written to, and runs are by default."
        yield Finding("disk", ERROR, text, "cd ANOTHER_FOLDER")
    yield from _shared_memory()
    refused = [
        f"{name} ({path})"
        for name, default in _CACHES.items()
        if not _is_writable(path := os.path.expanduser(os.environ.get(name, default)))
    ]
    if refused:
        text = f"caches of downloads and kernels cannot be written to: {', '.join(refused)}."
        first = refused[0].partition(" ")[0]
        yield Finding("caches", NOTE, text, f"export {first}=FOLDER")
    else:
        yield Finding("caches", OK, "folders of downloads and kernels can be written to.")


def _shared_memory() -> Iterator[Finding]:
    shared = "/dev/shm"
    if not os.path.isdir(shared):  # not on macOS and Windows, which have no such limit
        return
    size = shutil.disk_usage(shared).total
    text = f"{size / _GIB:.1f} GiB of shared memory, through which workers hand over batches."
    if size < _SHARED_BYTES:
        yield Finding(
            "memory",
            NOTE,
            f"only {text} Give the container more, or set dataloader.train.num_workers=0.",
            "docker run --shm-size=8g",
        )
    else:
        yield Finding("memory", OK, text)


def _is_writable(path: str) -> bool:
    """Whether a folder can be written to, or made."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK)


def describe() -> dict[str, str]:
    """Facts of the machine, by name."""
    facts = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processors": str(os.cpu_count()),
    }
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        facts["memory"] = f"{pages * size / _GIB:.1f} GiB"
    except (AttributeError, ValueError, OSError):  # not on Windows
        pass
    return facts
