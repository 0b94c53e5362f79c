"""tools/soak.py: what it sees of processes, and what it calls flat."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bench.processes import Usage, growth, usage
from bench.soak import Periods, Watched, judged

ROOT = Path(__file__).parents[2]

PERIODS = Periods(total=1000, between=250, warmup=200)


def test_the_slope_and_its_error_are_those_of_the_line() -> None:
    random = np.random.default_rng(0)
    axis = np.arange(0, 2, 0.002)
    found = [growth(axis, 5 + 3 * axis + random.normal(0, 1, len(axis))) for _ in range(200)]
    slopes = [line.slope for line in found]
    assert np.mean(slopes) == pytest.approx(3, abs=0.02)
    assert np.std(slopes) == pytest.approx(np.mean([line.error for line in found]), rel=0.2)
    with pytest.raises(ValueError, match="3 samples are too few"):
        growth([1, 2, 3], [1, 2, 3])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_children_count_with_memory_files_and_threads() -> None:
    child = (
        "held = bytearray(b'x' * (40 << 20)); files = [open('/proc/self/stat') for _ in range(9)]"
    )
    program = (
        "import subprocess, sys, threading\n"
        "event = threading.Event()\n"
        "threading.Thread(target=event.wait, daemon=True).start()\n"
        f"code = {child!r} + '; print(1, flush=True); input()'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        found = usage(process.pid)
        process.kill()
    assert found.processes == 2 and found.threads == 3
    assert 40 < found.mib < 100 and 9 + 6 <= found.handles < 30
    assert found.cpu_seconds > 0
    assert usage(process.pid) is None


def run(
    mib: float = 0.0, handles: float = 0.0, threads: float = 0.0, time: float = 0.0
) -> list[Watched]:
    """Samples of a run whose quantities grow by so much per 1,000 iterations."""
    random = np.random.default_rng(0)
    watched, cpu = [], 0.0
    for iteration in range(0, 1000, 5):
        evaluates = iteration % 250 == 245
        thousands = iteration / 1000
        cpu += 1 + time * thousands
        now = Usage(
            seconds=float(iteration),
            mib=500 + mib * thousands + random.normal(0, 1) + 300 * evaluates,
            handles=int(60 + handles * thousands + 40 * evaluates),
            processes=5 if evaluates else 3,
            threads=int(10 + threads * thousands),
            cpu_seconds=cpu,
        )
        watched += [Watched(iteration, now)] * (4 if evaluates else 1)
    return watched


def test_what_grows_is_named(subtests: pytest.Subtests) -> None:
    for grows, bad in [
        ({}, []),
        ({"mib": 20}, ["memory"]),
        ({"mib": -20}, []),
        ({"handles": 10}, ["handles"]),
        ({"threads": 8}, ["threads"]),
        ({"time": 0.5}, ["time"]),
    ]:
        with subtests.test(grows=grows):
            found = judged(run(**grows), PERIODS)
            assert found["not_flat"] == bad
            assert found["mib"]["slope"] == pytest.approx(grows.get("mib", 0), abs=2)
            assert found["mib"]["mean"] < 520  # evaluations are left out
            assert found["iterations_per_second"] == pytest.approx(1)


def test_a_run_that_ends_in_its_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="200 iterations"):
        judged(run()[:20], PERIODS)
