#!/usr/bin/env python
"""Kills trainings at random moments, resumes them, and compares what they end with.

python tools/kill_points.py [--points 20] [--seed 0] [--cases ms_cs ...]
    [--output results/reliability_resume.json]

Each case is trained once without disturbance, and then as a run that is killed with SIGKILL and
continued with --resume again and again, at iterations drawn over its whole length: its process
group at a random time within the iteration and what follows it (`time`) or at a random byte of the
checkpoint after it (`write`), or one process of two alone (`rank`). A run that ends before all
points are used is followed by another one. The weights, the state of the training and every row of
metrics.json have to be equal bit for bit, times aside.
Exits with 1 where they are not, or where a killed run does not resume.
"""

from __future__ import annotations

import argparse
import builtins
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from bench.machine import note  # noqa: E402
from detectron2.utils import comm  # noqa: E402

import train_net  # noqa: E402
from contrast_d2 import files  # noqa: E402
from contrast_d2.engine import Trainer, argument_parser  # noqa: E402

_ITERATIONS = 40
# The job with all its parts, on a network of 0.4 M weights: a start takes seconds.
_SMALL = [
    "model.backbone.name=test_resnet",
    "model.sem_seg_head.fpn_channels=16",
    "model.sem_seg_head.conv_dims=32",
    "model.contrast.embed_dim=16",
    "dataloader.train.mapper.augmentations.crop_size=[64,64]",
    "dataloader.train.total_batch_size=4",
    "dataloader.test.num_workers=0",
    "train.clip_norm=5.0",
    f"train.max_iter={_ITERATIONS}",
    "train.checkpointer.period=2",
    "train.eval_period=10",
    "train.log_period=3",
]
_MEMORY = [
    "model.contrast.warmup_iters=10",
    "model.contrast.memory.regions_per_class=4",
    "model.contrast.memory.pixels_per_class=50",
]
# A launcher ends long before this when one of its processes dies.
_BOUND_SECONDS = 300.0


class Case(NamedTuple):
    """A training: experiment file below configs/shapes, overrides, processes."""

    config: str
    options: list[str]
    processes: int = 1


CASES = {
    "ms_cs": Case("semfpn_r18_ms_cs_demo.py", []),
    "pixel_memory": Case("semfpn_r18_pixel_memory_demo.py", _MEMORY),
    "contextrast": Case("semfpn_r18_contextrast_demo.py", []),
    "pne": Case("semfpn_r18_pne_demo.py", []),
    "ms_cs, fp16 with scaler, accumulation, weight average, repeat factors, 2 workers": Case(
        "semfpn_r18_ms_cs_demo.py",
        [
            "train.amp.enabled=True",
            "train.amp.dtype=fp16",
            "train.accumulation_steps=2",
            "train.ema_decay=0.9",
            "dataloader.train.repeat_threshold=0.3",
            "dataloader.train.num_workers=2",
        ],
    ),
    "pixel_memory, 2 processes": Case("semfpn_r18_pixel_memory_demo.py", _MEMORY, processes=2),
}


class Death(NamedTuple):
    """When a training is killed.

    kind: "time", "write" or "rank".
    iteration: from its beginning on.
    after: seconds after that; for "write", bytes of checkpoints written since then.
    rank: the process that kills, and for "rank" dies alone.
    """

    kind: str
    iteration: int
    after: float
    rank: int

    def strike(self) -> None:
        """Kills."""
        if self.kind == "rank":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.killpg(0, signal.SIGKILL)


class DyingFile:
    """A file that ends its process group once so many bytes went into it and those before it."""

    def __init__(self, file: IO[bytes], death: Death, written: list[int]) -> None:
        self._file = file
        self._death = death
        self._written = written

    def write(self, data: bytes) -> int:
        content = memoryview(data).cast("B")
        left = int(self._death.after) - self._written[0]
        if left < len(content):
            self._file.write(content[:left])
            self._file.flush()
            self._death.strike()
        self._written[0] += len(content)
        return self._file.write(data)

    def __enter__(self) -> DyingFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def train(death: Death | None, clock: str, args: argparse.Namespace) -> None:
    """One process of a training that is to die.

    Args:
        death: when; None to train to the end.
        clock: file for the seconds that the training loop took.
        args: of train_net.py.
    """
    plain_train, plain_step = Trainer.train, Trainer.run_step

    def timed(trainer: Trainer, start_iter: int, max_iter: int) -> None:
        start = time.perf_counter()
        plain_train(trainer, start_iter, max_iter)
        if comm.is_main_process():
            Path(clock).write_text(str(time.perf_counter() - start))

    def step(trainer: Trainer) -> None:
        if trainer.iter >= death.iteration and not armed and death.rank == comm.get_rank():
            armed.append(death)
            if death.kind != "write":
                timer = threading.Timer(death.after, death.strike)
                timer.daemon = True
                timer.start()
        plain_step(trainer)

    def dying_open(path: str, mode: str = "r") -> Any:
        file = builtins.open(path, mode)
        return DyingFile(file, death, written) if armed and ".pth." in str(path) else file

    armed: list[Death] = []
    written = [0]
    Trainer.train = timed
    if death:
        Trainer.run_step = step
        if death.kind == "write":
            files.open = dying_open
    train_net.main(args)


def attempt(
    case: Case, folder: Path, *, resume: bool, death: Death | None
) -> tuple[int, float, float]:
    """Trains in a process group of its own, forked from this process, which has all imported.

    Returns:
        Its status as `os.waitpid` has it, negative for a signal; the seconds it lived; and the
        seconds that the training loop took, nan if it did not end.
    """
    folder.mkdir(exist_ok=True)
    clock = folder.with_suffix(".seconds")
    clock.unlink(missing_ok=True)
    arguments = ["--config-file", str(ROOT / "configs/shapes" / case.config)]
    arguments += ["--num-gpus", str(case.processes), *(["--resume"] if resume else [])]
    arguments += [*_SMALL, *case.options, f"train.output_dir={folder}"]
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 1
        try:
            log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            args = argument_parser().parse_args(arguments)
            train_net.start(partial(train, death, str(clock)), args, timedelta(minutes=30))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = _wait(child)
    seconds = float(clock.read_text()) if clock.exists() else math.nan
    return status, time.monotonic() - start, seconds


def _wait(child: int) -> int:
    deadline = time.monotonic() + _BOUND_SECONDS
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise RuntimeError(f"a training still ran after {_BOUND_SECONDS:.0f} s")
    return os.waitstatus_to_exitcode(status)


def differences(whole: Path, other: Path) -> list[str]:
    """Where two finished runs differ: paths into their checkpoints, rows of their metrics."""
    found = []
    for name in ("model_final.pth", "model_best.pth", "model_inference.pth"):
        contents = [torch.load(run / name, weights_only=True) for run in (whole, other)]
        for content in contents:
            content.pop("config", None)  # in which the folder is another one
        a, b = map(_leaves, contents)
        found += [f"{name}{path}" for path in a.keys() ^ b.keys()]
        found += [f"{name}{path}" for path in a.keys() & b.keys() if not _equal(a[path], b[path])]
    a, b = (_rows(run / "metrics.json") for run in (whole, other))
    if len(a) != len(b):
        found.append(f"metrics.json: {len(a)} and {len(b)} rows")
    found += [f"metrics.json: {x} and {y}" for x, y in zip(a, b, strict=False) if x != y]
    return found


def _rows(path: Path) -> list[str]:
    """The rows of metrics as text, so that nan equals nan, without times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    times = ("time", "data_time", "eta_seconds")
    return [json.dumps({k: v for k, v in row.items() if k not in times}) for row in rows]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """All leaves of nested dicts and lists by path."""
    if not isinstance(value, (dict, list, tuple)):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    leaves = {}
    for key, inner in items:
        leaves.update(_leaves(inner, f"{prefix}/{key}"))
    return leaves


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b or (a != a and b != b)


def disturb(case: Case, points: int, rng: random.Random, folder: Path) -> dict[str, Any]:
    """Kills and resumes runs of a case until all points are used.

    Returns:
        What happened, with `differences` and `failures`, both empty where the promise holds.
    """
    whole = folder / "whole"
    status, _, loop_seconds = attempt(case, whole, resume=False, death=None)
    if status:
        raise RuntimeError(f"the undisturbed training failed, see {whole.with_suffix('.log')}")
    size = (whole / "model_final.pth").stat().st_size
    result: dict[str, Any] = {"loop_seconds": loop_seconds, "kills": [], "runs": 0}
    result |= {"differences": [], "failures": []}
    kinds = ["time", "write"] + ["rank"] * (case.processes > 1)
    # In ascending order, so that the points of one run lie all over it.
    deaths = []
    for i, iteration in enumerate(sorted(rng.randrange(_ITERATIONS) for _ in range(points))):
        kind = kinds[i % len(kinds)]
        most = size if kind == "write" else 2 * loop_seconds / _ITERATIONS
        rank = 0 if kind == "write" else rng.randrange(case.processes)
        deaths.append(Death(kind, iteration, rng.uniform(0.0, most), rank))
    while deaths and not result["failures"]:
        result["runs"] += 1
        run = folder / f"run{result['runs']}"
        ended = False
        while not ended:
            death = deaths[0] if deaths else None
            status, lived, _ = attempt(case, run, resume=run.exists(), death=death)
            ended = status == 0
            alone = death is not None and death.kind == "rank"
            if not ended and not (death and (status == -signal.SIGKILL or alone)):
                result["failures"].append(f"status {status}, see {run.with_suffix('.log')}")
                break
            if not ended:
                deaths.pop(0)
                last = run / "last_checkpoint"
                result["kills"].append(
                    {
                        **death._asdict(),
                        "after": round(death.after, 3),
                        "seconds": round(lived, 1),
                        "last_checkpoint": last.read_text() if last.exists() else None,
                    }
                )
        if ended:
            result["differences"] += differences(whole, run)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 1 where a run does not resume, or ends with something else.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=20, help="kills per case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    if options.points < 1:
        parser.error(f"--points {options.points}: needs at least 1")
    torch.set_num_threads(1)
    head = {**note(torch.device("cpu")), "seed": options.seed, "points": options.points}
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for i, name in enumerate(options.cases):
            folder = Path(scratch, str(i))
            folder.mkdir()
            rng = random.Random(f"{options.seed} {name}")
            result = disturb(CASES[name], options.points, rng, folder)
            results[name] = result
            print(
                f"{name}: {len(result['kills'])} kills in {result['runs']} runs, "
                f"{len(result['differences'])} differences, {len(result['failures'])} failures",
                flush=True,
            )
            for line in result["failures"] + result["differences"][:5]:
                print(f"  {line[:300]}", flush=True)
            if result["failures"]:
                print(_last_lines(folder), flush=True)
    if options.output:
        # Cases may be run one by one: those of before stay.
        known = json.loads(options.output.read_text()) if options.output.exists() else {}
        known |= {name: {**head, **result} for name, result in results.items()}
        options.output.write_text(json.dumps(known, indent=2) + "\n")
    return int(any(result["differences"] or result["failures"] for result in results.values()))


def _last_lines(folder: Path) -> str:
    return "\n".join(
        f"{log}: {line}"
        for log in sorted(folder.glob("*.log"))
        for line in log.read_text().splitlines()[-5:]
    )


if __name__ == "__main__":
    sys.exit(main())
