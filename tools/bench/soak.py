"""Trains for a long time and watches from outside whether memory, handles or workers grow."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from contrast_d2.studio.visualize import GRID, LINE_COLORS

from .machine import Say, note
from .processes import Growth, Usage, growth, usage

ROOT = Path(__file__).parents[2]

# A slope is called flat if it is within two standard errors of 0, or so small that a run of 100,000
# iterations would not gain a tenth of a GiB by it.
FLAT_MIB = 1.0
# Open files come and go with the batches that workers hand over.
FLAT_HANDLES = 2.0
# Of the time of an iteration, over the whole run.
FLAT_TIME = 0.1


class Watched(NamedTuple):
    """What a run's processes held at an iteration."""

    iteration: int
    usage: Usage


class Periods(NamedTuple):
    """How the watched runs are divided; in iterations.

    Attributes:
        total: length of a run.
        between: evaluations, each with a checkpoint.
        warmup: those at the start that are not judged, since the heap and the banks fill in them.
    """

    total: int
    between: int
    warmup: int


def measure(
    files: Sequence[Path], overrides: Sequence[str], periods: Periods, folder: Path, say: Say
) -> dict[str, Any]:
    """Trains with experiment files in turn, each by `train_net.py`.

    Args:
        files: what to train with.
        overrides: key=value, for each of them.
        periods: lengths.
        folder: for what the runs leave.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, and for each file what was found and the watched values.

    Raises:
        ValueError: the runs are too short to be judged.
        RuntimeError: a run fails; its last words.
    """
    if not periods.warmup < periods.total - periods.between:
        raise ValueError(
            f"{periods.total} iterations with {periods.warmup} of warm-up: too few are left."
        )
    start = time.monotonic()
    runs = {}
    for file in files:
        watched = watch(file, overrides, periods, folder / file.stem)
        runs[file.stem] = judged(watched, periods)
        say(f"{file.stem}: {line_of(runs[file.stem])}")
    return {
        **note(torch.device("cpu")),
        "overrides": list(overrides),
        "iterations": periods._asdict(),
        "flat": {
            "mib_per_1000_iterations": FLAT_MIB,
            "handles_per_1000_iterations": FLAT_HANDLES,
            "share_of_time": FLAT_TIME,
        },
        "minutes": (time.monotonic() - start) / 60,
        "runs": runs,
    }


def watch(
    file: Path, overrides: Sequence[str], periods: Periods, output_dir: Path, every: float = 1.0
) -> list[Watched]:
    """Trains with an experiment file and samples the tree of its processes.

    Args:
        file: the experiment file.
        overrides: key=value.
        periods: lengths.
        output_dir: of the run.
        every: seconds between samples.

    Returns:
        The samples from the first logged iteration on.

    Raises:
        RuntimeError: the run fails; its last words.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        "train.output_dir": output_dir,
        "train.max_iter": periods.total,
        "train.eval_period": periods.between,
        "train.checkpointer.period": periods.between,
        "train.log_period": max(1, periods.between // 20),
    }
    command = [sys.executable, "train_net.py", "--config-file", str(file.resolve()), *overrides]
    command += [f"{key}={value}" for key, value in settings.items()]
    metrics = output_dir / "metrics.json"
    metrics.unlink(missing_ok=True)
    watched: list[Watched] = []
    with open(output_dir / "output.txt", "w+b") as output:
        run = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while run.poll() is None:
                time.sleep(every)
                iteration, now = _last_iteration(metrics), usage(run.pid)
                if iteration is not None and now is not None:
                    watched.append(Watched(iteration, now))
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGTERM)
                run.wait()
        if run.returncode:
            output.seek(0)
            raise RuntimeError(f"{file}: status {run.returncode}: {output.read()[-2000:].decode()}")
    return watched


def judged(watched: Sequence[Watched], periods: Periods) -> dict[str, Any]:
    """What the samples of a run say.

    Args:
        watched: the samples, in order.
        periods: lengths.

    Returns:
        After warm-up: slopes of memory and handles, between evaluations, and of the processor time
        of an iteration, with their standard errors, per 1,000 iterations; the fewest processes and
        threads at the start and at the end; what is not flat.

    Raises:
        ValueError: there are too few samples.
    """
    late = [w for w in watched if w.iteration >= periods.warmup]
    if not late or late[0].iteration == late[-1].iteration:
        raise ValueError(
            f"no progress was seen after the {periods.warmup} iterations of warm-up: run longer."
        )
    # While it trains, iterations advance; an evaluation brings workers of its own.
    usual = statistics.mode(
        b.usage.processes for a, b in zip(late, late[1:], strict=False) if b.iteration > a.iteration
    )
    training = [w for w in late if w.usage.processes == usual]
    axis = [w.iteration / 1000 for w in training]
    memory = growth(axis, [w.usage.mib for w in training])
    time_growth = _time_growth(late, usual)
    handles = growth(axis, [w.usage.handles for w in training])
    # The fewest of the first and of the last third: what is left behind stays.
    third = len(late) // 3
    counts = {
        name: [min(getattr(w.usage, name) for w in part) for part in (late[:third], late[-third:])]
        for name in ("processes", "threads")
    }
    length = axis[-1] - axis[0]
    bad = [name for name, (first, last) in counts.items() if last > first]
    if memory.slope > max(2 * memory.error, FLAT_MIB):
        bad.append("memory")
    if handles.slope > max(2 * handles.error, FLAT_HANDLES):
        bad.append("handles")
    if time_growth.slope * length > max(2 * time_growth.error * length, FLAT_TIME):
        bad.append("time")
    return {
        "mib": {**memory._asdict(), "most": max(w.usage.mib for w in watched)},
        "cpu_time": time_growth._asdict(),
        "handles": handles._asdict(),
        "iterations_per_second": _rate(late),
        **counts,
        "not_flat": bad,
        "samples": [[w.iteration, round(w.usage.mib, 1), w.usage.handles] for w in watched],
    }


def line_of(found: dict[str, Any]) -> str:
    """One line on a run."""
    memory, cpu = found["mib"], found["cpu_time"]
    verdict = f"NOT FLAT: {', '.join(found['not_flat'])}" if found["not_flat"] else "flat"
    return (
        f"{memory['mean']:.0f} MiB, {memory['slope']:+.2f} ± {memory['error']:.2f} MiB per 1,000 "
        f"iterations; processor time {100 * cpu['slope']:+.1f} ± {100 * cpu['error']:.1f} % per "
        f"1,000; {found['handles']['slope']:+.1f} ± {found['handles']['error']:.1f} of "
        f"{found['handles']['mean']:.0f} handles per 1,000: {verdict}"
    )


def plot(results: dict[str, Any]) -> Figure:
    """Memory and open files of each run by iteration.

    Args:
        results: of `measure`.
    """
    figure = Figure(figsize=(9, 3.4), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, column, label in zip(axes, (1, 2), ("memory [MiB]", "open files"), strict=True):
        for color, (name, run) in zip(LINE_COLORS, results["runs"].items(), strict=False):
            points = run["samples"]
            ax.plot([p[0] for p in points], [p[column] for p in points], color=color, label=name)
        ax.set_ylim(bottom=0)
        ax.grid(color=GRID)
        ax.set_xlabel("iteration")
        ax.set_ylabel(label)
    axes[0].legend(fontsize=7)
    return figure


def _time_growth(late: Sequence[Watched], usual: int) -> Growth:
    """Growth of the processor time of an iteration, relative to its mean, between evaluations.

    Wall-clock time would tell of whoever else is on the machine.
    """
    pairs: list[tuple[Watched, Watched]] = []
    last: Watched | None = None
    for w in late:
        if w.usage.processes != usual:
            last = None
        elif last is None:
            last = w
        elif w.iteration > last.iteration:
            pairs.append((last, w))
            last = w
    seconds = [
        (b.usage.cpu_seconds - a.usage.cpu_seconds) / (b.iteration - a.iteration) for a, b in pairs
    ]
    found = growth([b.iteration / 1000 for _, b in pairs], seconds)
    return Growth(found.slope / found.mean, found.error / found.mean, found.mean)


def _rate(late: Sequence[Watched]) -> float:
    seconds = late[-1].usage.seconds - late[0].usage.seconds
    return (late[-1].iteration - late[0].iteration) / seconds


def _last_iteration(metrics: Path) -> int | None:
    """The last iteration that a run has logged; None before the first."""
    if not metrics.exists():
        return None
    with open(metrics, "rb") as file:
        file.seek(max(0, os.path.getsize(metrics) - 8192))
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is being written
    return json.loads(lines[-1])["iteration"] if lines else None
