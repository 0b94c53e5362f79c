#!/usr/bin/env python
"""Watch what long training, long evaluation and a huge dataset take, and whether it grows.

Usage:
    python tools/soak.py training configs/camvid/semfpn_r18_{base,ms_cs}_cpu.py \\
        --output results/reliability_soak.json
    python tools/soak.py evaluation --output results/reliability_evaluation.json
    python tools/soak.py dataset --output results/reliability_million.json

Linux only: memory and handles are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
from bench import huge, soak


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 1 for a mistake, 2 where something grows that must not.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_training(commands)
    _add_evaluation(commands)
    _add_dataset(commands)
    options = parser.parse_args(arguments)
    try:
        if not Path("/proc/self/smaps_rollup").exists():
            raise ValueError("memory is read from Linux's /proc/PID/smaps_rollup: not here.")
        return options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_training(commands: Any) -> None:
    parser = commands.add_parser("training", help="train with experiment files in turn")
    parser.set_defaults(run=_training)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="experiment files")
    parser.add_argument("--iterations", type=int, default=2000, help="of each (default 2000)")
    parser.add_argument(
        "--period", type=int, default=250, help="of evaluations and checkpoints (default 250)"
    )
    parser.add_argument("--warmup", type=int, default=500, help="are not judged (default 500)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every file"
    )
    _add_output(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the samples")


def _add_evaluation(commands: Any) -> None:
    parser = commands.add_parser("evaluation", help="evaluate many images")
    parser.set_defaults(run=_evaluation)
    parser.add_argument("--images", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--workers", type=int, default=2, help="of the loader (default 2)")
    _add_output(parser)


def _add_dataset(commands: Any) -> None:
    parser = commands.add_parser("dataset", help="list, sample and resume a huge dataset")
    parser.set_defaults(run=_dataset)
    parser.add_argument("--entries", type=int, default=1_000_000, help="(default 1,000,000)")
    parser.add_argument("--classes", type=int, default=150, help="of the dataset (default 150)")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="the results as JSON")


def _training(options: argparse.Namespace) -> int:
    periods = soak.Periods(options.iterations, options.period, options.warmup)
    with tempfile.TemporaryDirectory() as folder:
        results = soak.measure(options.files, options.set, periods, Path(folder), _say)
    _write(results, options.output)
    if options.plot is not None:
        soak.plot(results).savefig(options.plot)
    return 2 if any(run["not_flat"] for run in results["runs"].values()) else 0


def _evaluation(options: argparse.Namespace) -> int:
    results = huge.measure_evaluation(options.images, options.workers, _say)
    _write(results, options.output)
    return 2 if results["not_flat"] else 0


def _dataset(options: argparse.Namespace) -> int:
    _write(huge.measure_dataset(options.entries, options.classes, _say), options.output)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _write(results: Mapping[str, Any], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
