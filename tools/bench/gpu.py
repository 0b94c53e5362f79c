"""Everything that is to be measured on a GPU, in one call of a given length.

Each measurement runs in another process, the most important first. One that fails, hangs or breaks
the state of the driver loses its own result only, and that process is started anew.

Shape letters: A anchors, D embedding width.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from contrast_d2.contrast.kernels import grouped, triton_tools

from . import contrast
from .cases import ALL_CASES
from .host_reads import count_host_reads
from .machine import Say, best_seconds, note
from .models import step_of
from .peers import textbook_info_nce
from .workloads import OURS, TEXTBOOK, Contender, InfoNCE, Step

_ROOT = Path(__file__).parents[2]
# A measurement takes no longer, or hangs; and none begins with less left.
_MOST_SECONDS, _LEAST_SECONDS = 150.0, 10.0
_CALLS = 5
_KERNELS = ("pack", "negatives", "positives", "coefficients", "gradient", "add_up")
_MOST_LAUNCHES = 40
_MOST_TIMES_LIMIT = 1.5
_MOST_LOSS_SHARE, _MOST_STEP_SHARE = 0.02, 0.05

# The name of a measurement, and what makes it.
Task = tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        rows: A of the InfoNCE, the one of the promise first.
        kernel_rows: A at which every width is measured.
        widths: D, the usual one first; it alone is measured at all `rows`.
        steps: names of cases.
        models: the files of a table, the baseline first, then ms_cs; batches; height and width.
        product: rows of the matrices, and bytes of the buffers, of which the peaks are taken.
        compiled: how many variants of the kernels are compiled; None for all.
    """

    rows: Sequence[int]
    kernel_rows: int
    widths: Sequence[int]
    steps: Sequence[str]
    models: Sequence[tuple[Sequence[str], Sequence[int], tuple[int, int]]]
    product: tuple[int, int]
    compiled: int | None = None


_METHODS = ("base", "ms_cs", "pixel_memory", "contextrast", "pne")
FULL = Sizes(
    rows=(9984, 4096, 1024, 256),
    kernel_rows=4096,
    widths=(256, 128, 512, 64),
    steps=("cityscapes_b8", "cityscapes_b2", "ade20k_b16"),
    models=(
        ([f"cityscapes/fcn_hrnet48_{x}_40k" for x in _METHODS], (8, 2), (512, 1024)),
        ([f"ade20k/upernet_swin_tiny_{x}_160k" for x in _METHODS[:2]], (16,), (512, 512)),
    ),
    product=(8192, 1 << 30),
)
DRY = Sizes(
    rows=(96, 64),
    kernel_rows=64,
    widths=(64,),
    steps=("tiny",),
    models=(([f"shapes/semfpn_r18_{x}_demo" for x in _METHODS], (2,), (64, 96)),),
    product=(64, 1 << 16),
    compiled=1,
)


def plan(sizes: Sizes, tests: Sequence[Sequence[str]]) -> Iterator[Task]:
    """All measurements, the most important first.

    Args:
        sizes: what is measured.
        tests: arguments of pytest, for each of its calls.
    """
    yield "peaks", peaks, (sizes,)
    if triton_tools.triton is not None and not triton_tools.is_interpreted():
        # What the compiler leaves in its cache serves what follows.
        yield "compiled", compiled, (sizes,)
    for precision in ("bf16", "fp32"):
        yield f"step {sizes.steps[0]} {precision}", step, (sizes.steps[0], precision)
        yield f"errors {precision}", errors, (sizes, precision)
        yield f"infonce {sizes.rows[0]} {precision}", infonce, (sizes.rows[0], precision)
    every = [
        (f"model {name} b{batch}{' channels-last' * last}", model, (files, batch, size, name, last))
        for files, batches, size in sizes.models
        for batch in batches
        for last in (True, False)
        for name in files
    ]
    yield from every[:2]
    for number, arguments in enumerate(tests):
        yield f"tests {number}", run_tests, (arguments,)
    kernels_of = [
        (f"kernels D{width} A{rows} {'split' if split else 'single'} {few}", variant, arguments)
        for width in sizes.widths
        for rows in (sizes.rows if width == sizes.widths[0] else (sizes.kernel_rows,))
        for split in (False, True)
        for few in ("few", "many")
        for arguments in [(sizes, width, rows, split, few)]
    ]
    usual = len(sizes.rows) * 4
    yield from kernels_of[:usual]
    for name in sizes.steps[1:]:
        for precision in ("bf16", "fp32"):
            yield f"step {name} {precision}", step, (name, precision)
    yield from every[2 : len(_METHODS)]
    for rows in sizes.rows[1:]:
        yield f"infonce {rows} bf16", infonce, (rows, "bf16")
    yield from every[len(_METHODS) :]
    yield from kernels_of[usual:]
    # What may leave the driver in a state of its own comes last.
    yield "compiled textbook", compiled_textbook, (sizes,)
    yield "graph", graph, (sizes,)


def measure(
    sizes: Sizes,
    device: torch.device,
    *,
    seconds: float,
    tests: Sequence[Sequence[str]] = (),
    keep: Callable[[Mapping[str, Any]], None],
    say: Say,
) -> dict[str, Any]:
    """Measures until all is done or the time is over.

    Args:
        sizes: what.
        device: a GPU, or the CPU for a rehearsal.
        seconds: for all.
        tests: as for `plan`.
        keep: is given the results after each measurement.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, results, failures, what was left out, and the promises.
    """
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    left_out: list[str] = []
    results = {**note(device), "found": found, "failed": failed, "left_out": left_out}
    pool = None
    for name, function, arguments in plan(sizes, tests):
        start = time.monotonic()
        if deadline - start < _LEAST_SECONDS:
            left_out.append(name)
            continue
        pool = pool or multiprocessing.get_context("spawn").Pool(1)
        call = pool.apply_async(_call, (function, device, arguments))
        try:
            found[name] = call.get(min(deadline - start, _MOST_SECONDS))
            lines = _lines(name, found[name])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            lines = [f"{name} FAILED: {failed[name]}"]
            pool.terminate()
            pool = None
        lines[0] += f"  ({time.monotonic() - start:.1f} s)"
        for line in lines:
            say(line)
        keep(results)
    if pool is not None:
        pool.terminate()
    results["promises"] = promises(results, sizes)
    for name, kept, words in results["promises"]:
        say(f"{'NOT MEASURED' if kept is None else 'PASS' if kept else 'FAIL'} {name}: {words}")
    if left_out:
        say(f"left out, for want of time: {', '.join(left_out)}")
    keep(results)
    return results


def promises(results: Mapping[str, Any], sizes: Sizes) -> list[tuple[str, bool | None, str]]:
    """Each promise: its name, whether it is kept (None if that was not measured), and figures."""
    found = results["found"]
    lines: list[tuple[str, bool | None, str]] = []

    def promise(name: str, parts: Sequence[str], judge: Callable[..., tuple[bool, str]]) -> None:
        missing = [part for part in parts if part not in found]
        verdict = (None, "no " + ", ".join(missing)) if missing else judge(*map(found.get, parts))
        lines.append((name, *verdict))

    for name in sizes.steps:
        for precision in ("bf16", "fp32"):
            key = f"step {name} {precision}"
            promise(
                f"{key}, launches and waits",
                [key],
                lambda row: (
                    row["launches"] <= _MOST_LAUNCHES and not row["waits"],
                    f"{row['launches']} launches, {row['waits']} waits",
                ),
            )
    promise(
        "InfoNCE near the limit of 16 bits",
        [f"infonce {sizes.rows[0]} bf16"],
        lambda row: (
            row[OURS]["times_limit"] <= _MOST_TIMES_LIMIT,
            f"{row[OURS]['times_limit']:.2f} times, of {_MOST_TIMES_LIMIT} "
            f"({row[OURS]['times_least']:.2f} times that of 3 A^2 D)",
        ),
    )
    base, method = (f"model {x} b{sizes.models[0][1][0]} channels-last" for x in _first(sizes))
    promise(
        "loss alone in a training step",
        [f"step {sizes.steps[0]} bf16", method],
        lambda loss, whole: _share(loss["device_ms"], whole["ms"], _MOST_LOSS_SHARE),
    )
    promise(
        "loss and projectors in a training step",
        [base, method],
        lambda less, whole: _share(whole["ms"] - less["ms"], whole["ms"], _MOST_STEP_SHARE),
    )
    for precision in ("bf16", "fp32"):
        key = f"errors {precision}"
        promise(
            f"{key}, within bounds",
            [key],
            lambda row: (not row["too_large"], "; ".join(row["too_large"]) or "all"),
        )
        promise(f"{key}, bit-equal runs", [key], lambda row: (row["equal"], str(row["equal"])))
    return lines


def _first(sizes: Sizes) -> Sequence[str]:
    return sizes.models[0][0][:2]


def _share(part: float, whole: float, most: float) -> tuple[bool, str]:
    return part <= most * whole, f"{part:.2f} of {whole:.2f} ms, {part / whole:.1%} of {most:.0%}"


def _lines(name: str, tree: Mapping[str, Any]) -> list[str]:
    """A result in words, a line for each table in it."""

    def flat(row: Mapping[str, Any]) -> str:
        parts = [(k, v) for k, v in row.items() if not isinstance(v, dict)]
        return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in parts)

    rows = [(key, value) for key, value in tree.items() if isinstance(value, dict)]
    return [f"{name}  {flat(tree)}", *(f"    {key}  {flat(value)}" for key, value in rows)]


# ---- in the other process


def _call(
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
def peaks(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """FLOP and bytes (read plus written) per second, and the driver."""
    number, size = sizes.product
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
    best = peaks(device, DRY if device.type == "cpu" else FULL)
    return flop / max(best["bf16"], best["fp16"]) + moved / best["copy"]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one of several calls in a row, after one that warms up."""
    run()
    return best_seconds(lambda: [run() for _ in range(_CALLS)], device, 4) / _CALLS


def _on_device(run: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """What the device did in some calls: by name, how often and how many microseconds in each.

    On a CPU these are the operations that PyTorch calls.
    """
    run()
    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    with profile(activities=[activity], acc_events=True) as found:
        for _ in range(_CALLS):
            run()
        if on_cuda:
            torch.cuda.synchronize()
    work: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        nested = not on_cuda and event.cpu_parent is not None
        if event.device_type == wanted and not nested and not event.is_user_annotation:
            work[event.name].append(event.time_range.elapsed_us())
    if not work:
        raise RuntimeError("the profiler saw no work of the device")
    return {name: (len(us) // _CALLS, sum(us) / _CALLS) for name, us in work.items()}


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


def compiled(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Registers, stack and spills, shared memory of all variants, compiled side by side."""
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
        parts = grouped.variants((major, minor))[: sizes.compiled]
        done = [*threads.map(ours, parts)]
        done += threads.map(of_gather, list(gather_variants())[: sizes.compiled])
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


def errors(device: torch.device, sizes: Sizes, precision: str) -> dict[str, Any]:
    """Errors against float64, and whether two runs agree in every bit."""
    with _autocast(device, precision):
        found = contrast.errors(device, torch.float32)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    run = InfoNCE(sizes.kernel_rows).contenders(device, [OURS])[OURS]
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


def variant(
    device: torch.device, sizes: Sizes, width: int, rows: int, split: bool, few: str
) -> dict[str, Any]:
    """Microseconds of each kernel, in its shape for little work or for much, and times its limit."""
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
    paths = [_ROOT / f"configs/{file}.py" for file in files]
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


def compiled_textbook(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The textbook form by torch.compile: ms."""
    anchors, labels, _, _ = InfoNCE(sizes.kernel_rows).inputs(device)
    backend = "inductor" if device.type == "cuda" else "eager"
    loss = torch.compile(textbook_info_nce, backend=backend, dynamic=False)
    run = Contender(lambda: loss(anchors, labels), [anchors])
    return {"rows": sizes.kernel_rows, "ms": 1000 * _seconds(run, device)}


def graph(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Our InfoNCE as a CUDA graph: ms of a replay and whether it agrees, or why there is none."""
    run = InfoNCE(sizes.kernel_rows).contenders(device, [OURS])[OURS]
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
    """A call of pytest: its status, and the end of what it says."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, timeout=_MOST_SECONDS - 5
    )
    lines = done.stdout.strip().splitlines()
    failures = [x for x in lines if x.startswith(("FAILED", "ERROR", "SUBFAILED"))]
    return {"status": done.returncode, "summary": lines[-1:], "failed": failures}


def gpu_tests() -> list[list[str]]:
    """Arguments of pytest for the tests that need a GPU, and for those of the kernels."""
    files = [str(x) for x in (_ROOT / "tests").rglob("test_*.py") if "mark.gpu" in x.read_text()]
    return [["-m", "gpu", *sorted(files)], ["-m", "not slow", "tests/contrast/kernels"]]
