"""The machine under the benchmark: its peaks, its description, and how time is taken on it."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .heap import KEPT_HEAP, heap_is_kept

# Is told what is found, line by line.
Say = Callable[[str], None]

_MATMUL_SIZES = (1024, 2048)
_CUDA_MATMUL_SIZES = (2048, 4096, 8192)
_BANDWIDTH_BYTES = 1 << 28
# A case is measured for so many rounds at least, however long they take.
_FEWEST_ROUNDS = 5
# In a round the peaks are the best of so many calls, and so are the contenders' times, if these
# calls of the slowest one take no longer than this.
_BEST_OF = 4
_MOST_SECONDS_OF_CALLS = 2.0
_LEAST_CPU_SHARE = 0.95


class Cost(NamedTuple):
    """What a computation cannot do without.

    Attributes:
        flop: floating-point operations of its matrix products, a multiply-add counting as two.
        written: bytes of large results that are written once, in order.
        moved: bytes that are read, or read and written, elsewhere.
    """

    flop: float
    written: float
    moved: float


class Peaks(NamedTuple):
    """What the machine reaches at best.

    Attributes:
        fp32, bf16: matrix products, in floating-point operations per second; on CUDA, those of
            fp32 operands are done by the tensor cores, in TF32. No bf16 where it is emulated.
        write: filling a large buffer, in bytes per second.
        copy: copying a large buffer, in bytes read plus bytes written per second.
    """

    fp32: float
    bf16: float | None
    write: float
    copy: float

    def limit(self, cost: Cost) -> float:
        """Least time in seconds of a computation whose products run in fp32."""
        return cost.flop / self.fp32 + cost.written / self.write + cost.moved / self.copy


class Timings(NamedTuple):
    """What `interleave` finds.

    Attributes:
        seconds: wall-clock time by contender and round, the best of `calls`.
        calls: how often each contender ran in a round.
        peaks: those of the machine in each round.
        cpu_share: processor time of this process over wall-clock time. Below 1 others had the
            processor, which the short products that the peaks are taken from hardly notice.
    """

    seconds: dict[str, list[float]]
    calls: int
    peaks: list[Peaks]
    cpu_share: float


class Probes:
    """Measures the machine's peaks, again and again at the same sizes.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        sizes = _CUDA_MATMUL_SIZES if device.type == "cuda" else _MATMUL_SIZES
        self._operands = {}
        for dtype in (torch.float32, *((torch.bfloat16,) if multiplies_bf16(device) else ())):
            candidates = [torch.rand(n, n, device=device).to(dtype) for n in sizes]
            rates = [self._matmul_rate(matrix) for matrix in candidates]
            self._operands[dtype] = candidates[rates.index(max(rates))]
        self._source = torch.rand(_BANDWIDTH_BYTES // 4, device=device)
        self._target = torch.empty_like(self._source)

    def measure(self) -> Peaks:
        """The peaks now; takes about a second on a CPU core."""
        bf16 = self._operands.get(torch.bfloat16)
        return Peaks(
            fp32=self._matmul_rate(self._operands[torch.float32]),
            bf16=None if bf16 is None else self._matmul_rate(bf16),
            write=_BANDWIDTH_BYTES / self._best(lambda: self._target.zero_()),
            copy=2 * _BANDWIDTH_BYTES / self._best(lambda: self._target.copy_(self._source)),
        )

    def _matmul_rate(self, matrix: torch.Tensor) -> float:
        result = torch.empty_like(matrix)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if matrix.is_cuda else precision)
        seconds = self._best(lambda: torch.mm(matrix, matrix, out=result))
        torch.set_float32_matmul_precision(precision)
        return 2 * len(matrix) ** 3 / seconds

    def _best(self, run: Callable[[], object]) -> float:
        return best_seconds(run, self._device, _BEST_OF)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has products of bf16, which others emulate.

    A CPU that oneDNN has no such products for, such as one with AVX2 and no AVX-512, takes some 100
    times as long as for fp32: too long to be timed, so PyTorch is asked.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def best_seconds(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Wall-clock seconds of the fastest of some calls."""
    return min(seconds_of(run, device) for _ in range(calls))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, all work of the device included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    probes: Probes,
    device: torch.device,
    *,
    rounds: int,
    most_seconds: float,
) -> Timings:
    """Times contenders in turn, round by round, so that all see the same state of the machine.

    What disturbs a single call makes it slower, never faster. Peaks are therefore the best of
    several calls, and so are the contenders' times, as long as a call is short; one that is long
    sees an average of the disturbances.

    Args:
        contenders: what to run, by name.
        probes: measured in every round.
        device: where they run.
        rounds: how many at most; the first one, which warms up, is not counted.
        most_seconds: no further round begins after so long, unless there are fewer than five.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = []
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        slowest = max(seconds_of(run, device) for run in contenders.values())
        calls = max(1, min(_BEST_OF, int(_MOST_SECONDS_OF_CALLS / max(slowest, 1e-6))))
        start, cpu_start = time.perf_counter(), time.process_time()
        least = min(rounds, _FEWEST_ROUNDS)
        while len(peaks) < least or (
            len(peaks) < rounds and time.perf_counter() - start < most_seconds
        ):
            peaks.append(probes.measure())
            for name, run in contenders.items():
                seconds[name].append(best_seconds(run, device, calls))
        cpu_share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
    finally:
        if collects:
            gc.enable()
    return Timings(seconds, calls, peaks, cpu_share)


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """The spread of some times, in ms."""
    return {name: 1000 * value for name, value in spread(seconds).items()}


def ratios(seconds: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """The spread of ratios, round by round: what slows the machine down for a while cancels."""
    return spread([a / b for a, b in zip(seconds, references, strict=True)])


def warning(timings: Timings) -> str | None:
    """One line where others used the machine so much that the times mean little, else None."""
    if timings.cpu_share > _LEAST_CPU_SHARE:
        return None
    return (
        f"  this process had the processor {timings.cpu_share:.0%} of the time: the machine is "
        "busy, and times and ratios to the limit are too high"
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 10th and 90th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p10": values[0], "p90": values[0]}
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


def median_peaks(peaks: Sequence[Peaks]) -> Peaks:
    """The median of each peak that is measured."""
    columns = zip(*peaks, strict=True)
    return Peaks(*(None if None in column else statistics.median(column) for column in columns))


def note(device: torch.device) -> dict[str, Any]:
    """What results have to be read with: command, commit, date, machine, versions."""
    # Brings detectron2, whose import takes seconds that the measuring processes need not spend.
    from contrast_d2.engine.record import commit_of

    packages = ("torch", "numpy", "timm", "triton", "pytorch-metric-learning")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit_of(Path(__file__)),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "heap": "kept" if heap_is_kept() else "default",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages if installed(name)},
        },
    }


def in_subprocess(module: str, job: Mapping[str, Any], settings: Mapping[str, str]) -> Any:
    """Runs a module of this package in a process of its own.

    Args:
        module: its name within the package; it reads a job and writes its result, both as JSON.
        job: what it is to do.
        settings: environment variables of the process; the heap's settings are not inherited.

    Returns:
        The result.

    Raises:
        RuntimeError: the process fails; its last words.
    """
    package = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k not in KEPT_HEAP} | dict(settings)
    path = [str(package.parent), str(package.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, "-m", f"{package.name}.{module}", json.dumps(job)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last_words = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise RuntimeError(f"{module} {json.dumps(job)}: status {done.returncode}: {last_words}")
    return json.loads(done.stdout.splitlines()[-1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> bool:
    """Whether a package is installed, by its name in the index."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
