#!/usr/bin/env python
"""Measures how far 2 and 4 processes are from one, and how soon a job ends when a process dies.

python tools/compare_processes.py [--output results/reliability_processes.json]

On the CPU, over gloo. The methods, scenes and deaths are those of tests/contrast/process_counts.py
and tests/engine/dying.py. Takes some minutes, of which most go to starting processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# ruff: noqa: E402
import torch
from bench.machine import note

from contrast_d2.engine import ProcessFailedError, launch
from tests.contrast.process_counts import (
    METHODS,
    SCENES,
    SPLITS,
    difference,
    in_order,
    joined,
    run_all,
    run_steps,
)
from tests.engine.dying import REASONS, die, free_port, start
from tests.helpers import run_processes

# Seconds of the collective timeout with which the hanging process is measured.
_TIMEOUT = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {
        **note(torch.device("cpu")),
        "images_by_process": {str(n): split for n, split in SPLITS.items()},
        "differences": {str(n): differences(n) for n in SPLITS},
        "deaths": deaths(),
    }
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def differences(num_processes: int) -> dict[str, dict[str, Any]]:
    """The largest difference to one process, over all scenes, by method and precision."""
    split = SPLITS[num_processes]
    dtypes = (torch.float64, torch.float32)
    cases = [(method, scene, dtype) for method in METHODS for scene in SCENES for dtype in dtypes]
    ranks = run_processes(run_all, num_processes, cases, split)
    table: dict[str, dict[str, Any]] = {}
    for case in cases:
        method, scene, dtype = case
        one = run_steps(method, scene, split, dtype)
        several = [rank[case] for rank in ranks]
        found: dict[str, Any] = difference(one, joined(several))
        first = several[0]["buffers"]
        found["ranks_have_the_same_buffers"] = all(
            buffer.equal(rank["buffers"][name])
            for rank in several
            for name, buffer in first.items()
        )
        found["memory_is_that_of_one_process"] = all(
            buffer.equal(in_order(first)[name])
            for name, buffer in in_order(one["buffers"]).items()
            if "memory" in name
        )
        row = table.setdefault(method, {}).setdefault(str(dtype).removeprefix("torch."), found)
        for key, value in found.items():
            row[key] = row[key] and value if isinstance(value, bool) else max(row[key], value)
    for method, rows in table.items():
        print(f"{num_processes} processes, {method}: {json.dumps(rows)}")
    return table


def deaths() -> list[dict[str, Any]]:
    """Seconds from a death to the end of the launch, and what is said."""
    rows = []
    jobs = [(how, *job) for how in REASONS for job in ((1, 2), (1, 4), (2, 1))]
    for how, machines, processes in [*jobs, ("hangs", 1, 2)]:
        with tempfile.TemporaryDirectory() as folder:
            end = _two_machines if machines == 2 else _one_machine
            message, ended = end(how, processes, folder)
            seconds = ended - float(Path(folder, "time").read_text())
        rows.append(
            {
                "how": how,
                "machines": machines,
                "processes_each": processes,
                "timeout": _TIMEOUT if how == "hangs" else None,
                "seconds": round(seconds, 2),
                "message": message,
            }
        )
        print(json.dumps(rows[-1]))
    return rows


def _one_machine(how: str, processes: int, folder: str) -> tuple[str, float]:
    timeout = {"timeout": timedelta(seconds=_TIMEOUT)} if how == "hangs" else {}
    try:
        launch(die, processes, args=(how, folder), **timeout)
    except ProcessFailedError as error:
        return str(error), time.time()
    raise RuntimeError(f"a process that {how} was not noticed")


def _two_machines(how: str, processes: int, folder: str) -> tuple[str, float]:
    """Two launches on this machine; the message of the one whose process lives."""
    url = f"tcp://127.0.0.1:{free_port()}"
    jobs = [
        start(f"die, {processes}, 2, {machine}, {url!r}, ({how!r}, {folder!r})")
        for machine in (0, 1)
    ]
    outputs = [job.communicate() for job in jobs]
    if any(job.returncode != 1 for job in jobs):
        raise RuntimeError(f"exit statuses {[job.returncode for job in jobs]}")
    messages = [errors.strip().splitlines()[-1] for _, errors in outputs]
    return messages[0].removeprefix("error: "), max(float(ended) for ended, _ in outputs)


if __name__ == "__main__":
    sys.exit(main())
