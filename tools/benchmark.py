#!/usr/bin/env python
"""Measure the contrastive part of a training step: time, memory and waits for the device.

Usage:
    python tools/benchmark.py contrast --threads 1 --output results/performance_cpu.json --check
    python tools/benchmark.py contrast --shapes infonce_2048 cityscapes_b2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
import torch
from bench import cases, contrast
from bench.machine import KEPT_HEAP, heap_is_kept


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 1 for a mistake, 2 where `--check` finds a promise broken.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_contrast(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1


def _add_contrast(commands: Any) -> None:
    parser = _add_command(
        commands,
        "contrast",
        "the contrastive step and the InfoNCE, against limit and peers",
        _contrast,
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=sorted(cases.ALL_CASES),
        default=list(cases.CASES),
        metavar="NAME",
        help=f"which to measure, of {', '.join(cases.ALL_CASES)} (default: all but the last ones, "
        "which are for tests and for --large)",
    )
    parser.add_argument("--large", action="store_true", help="also run 100,000 anchors, once")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds (default 20)")
    parser.add_argument(
        "--seconds", type=float, default=30, help="begin no round of a case after it (default 30)"
    )
    parser.add_argument("--check", action="store_true", help="fail where a promise does not hold")


def _add_command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"Measure {summary}.")
    parser.set_defaults(run=run)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda (default {default})")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the results as JSON"
    )
    return parser


def _contrast(options: argparse.Namespace) -> int:
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: needs at least 1")
    names = options.shapes + (list(cases.LARGE_CASES) if options.large else [])
    torch.set_num_threads(options.threads)
    results = contrast.measure(
        names,
        torch.device(options.device),
        rounds=options.repeats,
        most_seconds=options.seconds,
        say=_say,
    )
    _write(results, options.output)
    broken = contrast.violations(results) if options.check else []
    for line in broken:
        print(f"benchmark: {line}", file=sys.stderr)
    return 2 if broken else 0


def _say(line: str) -> None:
    print(line, flush=True)


def _write(results: Mapping[str, Any], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


def _keep_heap() -> None:
    """Starts this process anew with settings that glibc reads at start only."""
    if sys.platform == "linux" and not heap_is_kept():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT_HEAP)


if __name__ == "__main__":
    _keep_heap()
    sys.exit(main())
