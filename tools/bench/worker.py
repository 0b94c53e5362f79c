"""Measures peak memory, or time with the system's heap, in a process of its own.

Reads a job as JSON from its only argument and prints the result as JSON.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .machine import in_subprocess, seconds_of
from .methods import MethodStep
from .scenes import Scene
from .training import TrainingStep
from .workloads import Contender, InfoNCE, Step

Workload = Step | InfoNCE | TrainingStep | MethodStep

# Every block above some pages comes from the system and goes back to it when freed, so that the
# resident set of the process is what is alive.
_OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
_MIB = 1 << 20
_SMALL_SCENE = Scene(
    batch=2,
    height=128,
    width=256,
    num_classes=19,
    classes_per_image=13,
    stuff_per_image=5,
    object_area=500.0,
    area_spread=1.0,
    seed=0,
)


def to_json(workload: Workload) -> dict[str, Any]:
    """A workload as a tree for JSON."""
    return {"kind": type(workload).__name__, **asdict(workload)}


def from_json(tree: Mapping[str, Any]) -> Workload:
    """The workload that `to_json` made a tree of."""
    kinds = {kind.__name__: kind for kind in (Step, InfoNCE, TrainingStep, MethodStep)}
    fields = {name: value for name, value in tree.items() if name != "kind"}
    if fields.get("scene") is not None:
        fields["scene"] = Scene(**fields["scene"])
    return kinds[tree["kind"]](**fields)


def peak_mib(
    work: Sequence[tuple[Workload, Sequence[str]]], device: torch.device
) -> list[dict[str, float]]:
    """Peak memory of one call beyond inputs and gradients, in MiB, in a fresh process.

    On a CPU that is the growth of the resident set (`VmHWM`), on one thread; on CUDA, of the
    allocator's peak. What a contender says it keeps from call to call is added.

    Args:
        work: workloads, each with the contenders that are measured on it.
        device: where.

    Returns:
        For each workload, the memory by contender.
    """
    return _run("memory", work, device, _OWN_PAGES | {"OMP_NUM_THREADS": "1"})


def default_heap_ms(
    workload: Workload, contenders: Sequence[str], device: torch.device
) -> dict[str, float]:
    """Median time of a call in ms, by contender, where the heap has the system's settings."""
    return _run("time", [(workload, contenders)], device, {})[0]


def resident_growth(run: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process grows at most during a call.

    Raises:
        ValueError: the system does not tell.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except OSError as error:
        raise ValueError(f"peak memory is read from Linux's /proc: {error}") from error


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise ValueError(f"/proc/self/status has no {key}")
    return int(match[1]) * 1024


def _run(
    quantity: str,
    work: Sequence[tuple[Workload, Sequence[str]]],
    device: torch.device,
    settings: Mapping[str, str],
) -> list[dict[str, float]]:
    job = {
        "quantity": quantity,
        "work": [[to_json(workload), list(contenders)] for workload, contenders in work],
        "device": str(device),
        "threads": 1 if quantity == "memory" else torch.get_num_threads(),
    }
    return in_subprocess("worker", job, settings)


def _do(job: Mapping[str, Any]) -> list[dict[str, float]]:
    device = torch.device(job["device"])
    torch.set_num_threads(job["threads"])
    measure = {"memory": _memory, "time": _time}[job["quantity"]]
    return [measure(from_json(tree), contenders, device) for tree, contenders in job["work"]]


def _time(workload: Workload, contenders: Sequence[str], device: torch.device) -> dict[str, float]:
    runs = workload.contenders(device, contenders)
    return {name: _median_ms(run, device) for name, run in runs.items()}


def _memory(
    workload: Workload, contenders: Sequence[str], device: torch.device
) -> dict[str, float]:
    # Code and buffers that are loaded once are no memory of the computation.
    for run in _small(workload).contenders(device, contenders).values():
        run()
    runs, output = workload.contenders(device, contenders), workload.gradient_bytes()
    return {name: (_growth(run, device) - output) / _MIB for name, run in runs.items()}


def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    run()
    return 1000 * statistics.median(seconds_of(run, device) for _ in range(5))


def _growth(run: Contender, device: torch.device) -> int:
    kept = run.settle()
    run.drop_gradients()
    if device.type != "cuda":
        return kept + resident_growth(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return kept + torch.cuda.max_memory_allocated() - before


def _small(workload: Workload) -> Workload:
    if isinstance(workload, InfoNCE):
        return replace(workload, anchors=4 * workload.classes, memory=min(64, workload.memory))
    if isinstance(workload, Step):
        return Step(_SMALL_SCENE, width=workload.width)
    if isinstance(workload, MethodStep):
        return workload
    return replace(workload, scene=replace(_SMALL_SCENE, num_classes=workload.scene.num_classes))


if __name__ == "__main__":
    print(json.dumps(_do(json.loads(sys.argv[1]))))
