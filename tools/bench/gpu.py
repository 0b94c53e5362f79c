"""Everything that is to be measured on a GPU, in one call of a given length.

Each measurement runs in another process, the most important first. One that fails, hangs or breaks
the state of the driver loses its own result only, and that process is started anew.

Shape letters: A anchors, D embedding width.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from contrast_d2.contrast.kernels import triton_tools

from . import gpu_work as work
from .machine import Say, note
from .workloads import OURS

# No measurement begins with less left.
_LEAST_SECONDS = 10.0
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
        compiled: how many variants of the kernels are compiled; None for all.
    """

    rows: Sequence[int]
    kernel_rows: int
    widths: Sequence[int]
    steps: Sequence[str]
    models: Sequence[tuple[Sequence[str], Sequence[int], tuple[int, int]]]
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
)
DRY = Sizes(
    rows=(96, 64),
    kernel_rows=64,
    widths=(64,),
    steps=("tiny",),
    models=(([f"shapes/semfpn_r18_{x}_demo" for x in _METHODS], (2,), (64, 96)),),
    compiled=1,
)


def plan(sizes: Sizes, tests: Sequence[Sequence[str]]) -> Iterator[Task]:
    """All measurements, the most important first.

    Args:
        sizes: what is measured.
        tests: arguments of pytest, for each of its calls.
    """
    yield "peaks", work.peaks, ()
    if triton_tools.triton is not None and not triton_tools.is_interpreted():
        # What the compiler leaves in its cache serves what follows.
        yield "compiled", work.compiled, (sizes.compiled,)
    for precision in ("bf16", "fp32"):
        yield f"step {sizes.steps[0]} {precision}", work.step, (sizes.steps[0], precision)
        yield f"errors {precision}", work.errors, (sizes.kernel_rows, precision)
        yield f"infonce {sizes.rows[0]} {precision}", work.infonce, (sizes.rows[0], precision)
    every = [
        (
            f"model {name} b{batch}{' channels-last' * last}",
            work.model,
            (files, batch, size, name, last),
        )
        for files, batches, size in sizes.models
        for batch in batches
        for last in (True, False)
        for name in files
    ]
    yield from every[:2]
    for number, arguments in enumerate(tests):
        yield f"tests {number}", work.run_tests, (arguments,)
    kernels_of = [
        (
            f"kernels D{width} A{rows} {'split' if split else 'single'} {few}",
            work.variant,
            arguments,
        )
        for width in sizes.widths
        for rows in (sizes.rows if width == sizes.widths[0] else (sizes.kernel_rows,))
        for split in (False, True)
        for few in ("few", "many")
        for arguments in [(width, rows, split, few)]
    ]
    usual = len(sizes.rows) * 4
    yield from kernels_of[:usual]
    for name in sizes.steps[1:]:
        for precision in ("bf16", "fp32"):
            yield f"step {name} {precision}", work.step, (name, precision)
    yield from every[2 : len(_METHODS)]
    for rows in sizes.rows[1:]:
        yield f"infonce {rows} bf16", work.infonce, (rows, "bf16")
    yield from every[len(_METHODS) :]
    yield from kernels_of[usual:]
    # What may leave the driver in a state of its own comes last.
    yield "compiled textbook", work.compiled_textbook, (sizes.kernel_rows,)
    yield "graph", work.graph, (sizes.kernel_rows,)


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
        call = pool.apply_async(work.call, (function, device, arguments))
        try:
            found[name] = call.get(min(deadline - start, work.MOST_SECONDS))
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
        kept, words = None, "no " + ", ".join(missing)
        if not missing:
            kept, words = judge(*map(found.get, parts))
        lines.append((name, kept, words))

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


def gpu_tests() -> list[list[str]]:
    """Arguments of pytest for the tests that need a GPU, and for those of the kernels."""
    files = [
        str(x) for x in (work.ROOT / "tests").rglob("test_*.py") if "mark.gpu" in x.read_text()
    ]
    return [["-m", "gpu", *sorted(files)], ["-m", "not slow", "tests/contrast/kernels"]]
