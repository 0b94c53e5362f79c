"""What `gpu` measures: each function is one measurement, on a GPU or, as a rehearsal, on the CPU.

Shape letters: A anchors, D embedding width.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from contrast_d2.contrast.kernels import grouped

from . import contrast
from .cases import ALL_CASES
from .host_reads import count_host_reads
from .machine import best_seconds
from .models import step_of
from .peers import textbook_info_nce
from .workloads import OURS, TEXTBOOK, Contender, InfoNCE, Step

ROOT = Path(__file__).parents[2]
# A measurement that takes longer hangs.
MOST_SECONDS = 150.0
_SECONDS_OF_TESTS = 100.0
# Rows of the matrices, and bytes of the buffers, of which the peaks are taken.
_SIZES = {"cuda": (8192, 1 << 30), "cpu": (64, 1 << 16)}
# Calls in a row, and how often so many are timed.
_CALLS = {"cuda": 5, "cpu": 1}
_KERNELS = ("pack", "negatives", "positives", "coefficients", "gradient", "add_up")


def call(
    function: Callable[..., dict[str, Any]], device: torch.device, arguments: Sequence[Any]
) -> dict[str, Any]:
    """A measurement, which leaves no memory behind."""
    try:
        return function(device, *arguments)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@cache
def peaks(device: torch.device) -> dict[str, Any]:
    """FLOP and bytes (read plus written) per second, and the driver."""
    number, size = _SIZES[device.type]
    found: dict[str, Any] = {}
    before = torch.get_float32_matmul_precision()
    for name, dtype in (
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    ):
        matrix = torch.randn(number, number, device=device).to(dtype)
        out = torch.empty_like(matrix)
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        seconds = _seconds(lambda a=matrix, b=out: torch.mm(a, a, out=b), device)
        found[name] = 2 * number**3 / seconds
    torch.set_float32_matmul_precision(before)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    found["write"] = size / _seconds(target.zero_, device)
    found["copy"] = 2 * size / _seconds(lambda: target.copy_(source), device)
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def _limit(device: torch.device, flop: float, moved: float) -> float:
    """Least seconds, with products of 16 bits."""
    best = peaks(device)
    return flop / max(best["bf16"], best["fp16"]) + moved / best["copy"]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one of several calls in a row, after one that warms up."""
    run()
    calls = _CALLS[device.type]
    return best_seconds(lambda: [run() for _ in range(calls)], device, calls) / calls


def _on_device(run: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """What the device did in some calls: by name, how often and how many microseconds in each.

    On a CPU these are the operations that PyTorch calls.
    """
    run()
    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    calls = _CALLS[device.type]
    with profile(activities=[activity]) as found:
        for _ in range(calls):
            run()
        if on_cuda:
            torch.cuda.synchronize()
    work: dict[str, list[float]] = defaultdict(list)
    for event in found.events() or ():
        nested = not on_cuda and event.cpu_parent is not None
        if event.device_type.name == activity.name and not nested and not event.is_user_annotation:
            work[event.name].append(event.time_range.elapsed_us())
    if not work:
        raise RuntimeError("the profiler saw no work of the device")
    return {name: (len(us) // calls, sum(us) / calls) for name, us in work.items()}


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


class _Run(NamedTuple):
    """A contender in a precision."""

    contender: Contender
    device: torch.device
    precision: str

    def __call__(self) -> Tensor:
        with _autocast(self.device, self.precision):
            return self.contender()


def _is_copy(name: str) -> bool:
    return name.startswith(("Memcpy", "Memset"))


def compiled(device: torch.device, most: int | None) -> dict[str, Any]:
    """Registers, stack and spills, shared memory of variants (None: all), compiled side by side."""
    from .compiled import Compiled, compile_kernel, compile_variant, gather_variants, name_of

    major, minor = (9, 0)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor

    def ours(part: grouped.Variant) -> tuple[str, Compiled]:
        return name_of(part), compile_variant(part, number)

    def of_gather(name: str) -> tuple[str, Compiled]:
        return name, compile_kernel(*gather_variants()[name], number)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        parts = grouped.variants((major, minor))[:most]
        done = [*threads.map(ours, parts)]
        done += threads.map(of_gather, list(gather_variants())[:most])
    return {
        name: {"registers": x.registers, "stack": x.stack, "shared": x.shared, "spills": x.spills}
        for name, x in done
    }


def step(device: torch.device, name: str, precision: str) -> dict[str, Any]:
    """The contrastive step of a case: time, that of the device, launches, copies and waits."""
    workload = ALL_CASES[name].workload
    assert isinstance(workload, Step)
    run = _Run(workload.contenders(device, [OURS])[OURS], device, precision)
    seconds = _seconds(run, device)
    work = _on_device(run, device)
    waits = count_host_reads(run, device)
    slowest = sorted(work, key=lambda x: -work[x][1])[:12]
    return {
        "ms": 1000 * seconds,
        "device_ms": sum(us for _, us in work.values()) / 1000,
        "launches": sum(n for x, (n, _) in work.items() if not _is_copy(x)),
        "copies": sum(n for x, (n, _) in work.items() if _is_copy(x)),
        "waits": waits.total(),
        "where": list(waits),
        "slowest": {x: f"{work[x][0]} x, {work[x][1]:.1f} us in all" for x in slowest},
    }


def errors(device: torch.device, rows: int, precision: str) -> dict[str, Any]:
    """Errors against float64, and whether two runs agree in every bit."""
    with _autocast(device, precision):
        found = contrast.errors(device, torch.float32)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    run = InfoNCE(rows).contenders(device, [OURS])[OURS]
    pairs = []
    for _ in range(2):
        loss = _Run(run, device, precision)()
        pairs.append([loss, *(x.grad.clone() for x in run.leaves if x.grad is not None)])
    return {
        **found,
        "too_large": contrast.too_large({str(dtype): found}),
        "equal": all(map(torch.equal, *pairs)),
    }


def infonce(device: torch.device, rows: int, precision: str) -> dict[str, Any]:
    """The InfoNCE, ours and the textbook's: ms, and times the limits.

    Similarities that are not stored cost 6 A^2 D: once and once again, and both gradients.
    """
    work = InfoNCE(rows)
    flop = 6.0 * rows * rows * work.width
    limit, least = (_limit(device, x, work.cost().moved) for x in (flop, work.cost().flop))
    found = {}
    for name, contender in work.contenders(device, [OURS, TEXTBOOK]).items():
        seconds = _seconds(_Run(contender, device, precision), device)
        found[name] = {
            "ms": 1000 * seconds,
            "times_limit": seconds / limit,
            "times_least": seconds / least,
        }
    device_work = _on_device(_Run(work.contenders(device, [OURS])[OURS], device, precision), device)
    return {**found, "device_ms": sum(us for _, us in device_work.values()) / 1000}


def variant(device: torch.device, width: int, rows: int, split: bool, few: str) -> dict[str, Any]:
    """Microseconds of each kernel, in its shape for few rows or for many, and times its limit."""
    real, index = grouped.shapes, 0 if few == "few" else -1
    work = InfoNCE(rows, width=width)
    run = _Run(work.contenders(device, [OURS])[OURS], device, "fp32" if split else "bf16")
    with patch.object(grouped, "shapes", lambda *options: [real(*options)[index]]):
        found = _on_device(run, device)
    products = 2.0 * rows * rows * width * (3 if split else 1)
    row_bytes = rows * width * 2 * (2 if split else 1)
    costs = {
        "pack": (0.0, rows * width * 4 + row_bytes),
        "negatives": (products, row_bytes),
        "positives": (products / work.classes, row_bytes),
        "coefficients": (0.0, rows * 4 * 4),
        "gradient": (2 * products, row_bytes + rows * width * 4),
        "add_up": (0.0, rows * width * 8),
    }
    parts = {}
    for kernel in _KERNELS:
        us = [time for name, (_, time) in found.items() if name.startswith(kernel)]
        if us:
            limit = 1e6 * _limit(device, *costs[kernel])
            parts[kernel] = {"us": sum(us), "times_limit": sum(us) / limit}
    if device.type == "cuda" and len(parts) < len(_KERNELS):
        raise RuntimeError(f"of our kernels only {list(parts)} ran, beside {list(found)}")
    return parts


def model(
    device: torch.device,
    files: Sequence[str],
    batch: int,
    size: tuple[int, int],
    name: str,
    channels_last: bool,
) -> dict[str, Any]:
    """A training step, with its update, in bf16: ms, share in which the device idles, memory."""
    paths = [ROOT / f"configs/{file}.py" for file in files]
    whole = step_of(paths, batch=batch, size=size, precision="bf16", channels_last=channels_last)
    run = whole.contenders(device, [Path(name).name])[Path(name).name]
    seconds = _seconds(run, device)
    busy = sum(us for _, us in _on_device(run, device).values()) / 1e6
    found = {"ms": 1000 * seconds, "device_ms": 1000 * busy, "idle": max(0.0, 1 - busy / seconds)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def compiled_textbook(device: torch.device, rows: int) -> dict[str, Any]:
    """The textbook form by torch.compile: ms."""
    anchors, labels, _, _ = InfoNCE(rows).inputs(device)
    backend = "inductor" if device.type == "cuda" else "eager"
    loss = torch.compile(textbook_info_nce, backend=backend, dynamic=False)
    run = Contender(lambda: loss(anchors, labels), [anchors])
    return {"rows": rows, "ms": 1000 * _seconds(run, device)}


def graph(device: torch.device, rows: int) -> dict[str, Any]:
    """Our InfoNCE as a CUDA graph: ms of a replay and whether it agrees, or why there is none."""
    run = InfoNCE(rows).contenders(device, [OURS])[OURS]
    expected = run()
    try:
        with ExitStack() as stack:
            side = torch.cuda.Stream()
            stack.enter_context(torch.cuda.stream(side))
            run()
            torch.cuda.synchronize()
            recorded = torch.cuda.CUDAGraph()
            stack.enter_context(torch.cuda.graph(recorded, stream=side))
            loss = run()
        seconds = _seconds(recorded.replay, device)
        return {"ms": 1000 * seconds, "equal": torch.equal(loss, expected)}
    except (RuntimeError, AssertionError) as error:
        return {"why_not": str(error).partition("\n")[0]}


def run_tests(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """A call of pytest: its status, negative if it took too long, and the end of what it says."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        try:
            output, _ = tests.communicate(timeout=_SECONDS_OF_TESTS)
        except subprocess.TimeoutExpired:
            tests.kill()
            output, _ = tests.communicate()
    lines = output.strip().splitlines()
    failures = [x for x in lines if x.startswith(("FAILED", "ERROR", "SUBFAILED"))]
    return {"status": tests.returncode, "summary": lines[-1:], "failed": failures}
