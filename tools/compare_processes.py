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
import warnings
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# ruff: noqa: E402
import torch
from bench.machine import note

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
from tests.engine.dying import start
from tests.helpers import run_processes


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
    """Seconds from the death of a process to the end of its launcher, and what that says."""
    rows = []
    for how in ("killed", "raises"):
        for processes in (2, 4):
            with tempfile.TemporaryDirectory() as folder:
                job = start(how, folder, "--num-gpus", str(processes))
                _, errors = job.communicate()
                died, ended = (float(Path(folder, n).read_text()) for n in ("time", "ended"))
            rows.append(
                {
                    "how": how,
                    "processes": processes,
                    "seconds": round(ended - died, 2),
                    "status": job.returncode,
                    "message": errors.strip().splitlines()[-1],
                }
            )
            print(json.dumps(rows[-1]))
    return rows


if __name__ == "__main__":
    sys.exit(main())
