#!/usr/bin/env python
"""Measure what training steps, loading and evaluation cost, in time and memory.

Usage:
    python tools/benchmark.py contrast --threads 1 --output results/performance_cpu.json --check
    python tools/benchmark.py contrast --shapes infonce_2048 cityscapes_b2
    python tools/benchmark.py growth --output results/performance_growth.json
    python tools/benchmark.py projection --output results/performance_projection.json
    python tools/benchmark.py data --output results/performance_data.json
    python tools/benchmark.py evaluation --output results/performance_evaluation.json
    python tools/benchmark.py model configs/cityscapes/fcn_hrnet48_{base,ms_cs}_40k.py --batch 2
    python tools/benchmark.py gpu --tests --output results/gpu.json
    python tools/benchmark.py tables
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
from bench.heap import keep_heap

if __name__ == "__main__":
    keep_heap()  # before the imports that take seconds

import torch
from bench import cases, contrast, growth, methods, models, projection, tables


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
    _add_growth(commands)
    _add_projection(commands)
    _add_model(commands)
    _add_data(commands)
    _add_evaluation(commands)
    _add_gpu(commands)
    _add_tables(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_contrast(commands: Any) -> None:
    parser = _add_measurement(
        commands, "contrast", "the contrastive step and the InfoNCE, against limit and peers"
    )
    parser.set_defaults(run=_contrast)
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=list(cases.ALL_CASES),
        default=list(cases.CASES),
        metavar="NAME",
        help=f"which to measure, of {', '.join(cases.ALL_CASES)} (default: the first "
        f"{len(cases.CASES)})",
    )
    parser.add_argument("--large", action="store_true", help="also run 100,000 anchors, once")
    parser.add_argument("--check", action="store_true", help="fail where a promise does not hold")


def _add_growth(commands: Any) -> None:
    parser = _add_measurement(
        commands, "growth", "time and memory against anchors, classes, batch and image size"
    )
    parser.set_defaults(run=_growth)
    parser.add_argument(
        "--largest", type=int, default=8192, metavar="N", help="most anchors (default 8192)"
    )


def _add_projection(commands: Any) -> None:
    parser = _add_measurement(
        commands, "projection", "a training step with dense and with sampled projection"
    )
    parser.set_defaults(run=_projection, repeats=3)
    parser.add_argument(
        "--backbone", default="hrnet_w48", help="of timm, under the FCN head (default hrnet_w48)"
    )
    parser.add_argument("--batch", type=int, default=1, help="images (default 1)")
    parser.add_argument("--height", type=int, default=512, help="of an image (default 512)")
    parser.add_argument("--width", type=int, default=1024, help="of an image (default 1024)")


def _add_data(commands: Any) -> None:
    summary = "reading and augmenting a training sample, against detectron2's mapper"
    parser = commands.add_parser("data", help=summary, description=f"Measure {summary}.")
    parser.set_defaults(run=_data, device="cpu", threads=1)
    parser.add_argument("--images", type=int, default=8, help="of each kind (default 8)")
    _add_rounds(parser)


def _add_evaluation(commands: Any) -> None:
    summary = "the evaluation of an image, against detectron2's evaluator"
    parser = commands.add_parser("evaluation", help=summary, description=f"Measure {summary}.")
    parser.set_defaults(run=_evaluation, device="cpu", threads=1)
    parser.add_argument("--images", type=int, default=3, help="how many (default 3)")
    _add_rounds(parser)


def _add_model(commands: Any) -> None:
    parser = _add_measurement(
        commands, "model", "whole training steps, updates included, of a baseline and methods"
    )
    parser.set_defaults(run=_model)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="experiment files, the baseline first"
    )
    parser.add_argument("--batch", type=int, help="images (default: as the baseline's file)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of an image (default: the baseline's crop)",
    )
    parser.add_argument(
        "--precision",
        choices=methods.PRECISIONS,
        default="fp32",
        help="autocast to it (default fp32)",
    )
    parser.add_argument("--compile", action="store_true", help="with torch.compile")


def _add_gpu(commands: Any) -> None:
    summary = "all that is to be known of a GPU, in one call of at most ten minutes"
    parser = commands.add_parser("gpu", help=summary, description=f"Measure {summary}.")
    parser.set_defaults(run=_gpu)
    parser.add_argument(
        "--seconds", type=float, default=540, help="begin nothing after so long (default 540)"
    )
    parser.add_argument("--tests", action="store_true", help="also run the tests for GPUs")
    parser.add_argument(
        "--dry-run", action="store_true", help="rehearse on the CPU, at the smallest sizes"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", required=True, help="where results go, as JSON"
    )


def _add_measurement(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"Measure {summary}.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda (default {default})")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    _add_rounds(parser)
    return parser


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds at most")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20,
        help="begin no further round after so long, once there are five (default 20)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the results as JSON"
    )


def _add_tables(commands: Any) -> None:
    summary = "rewrite the tables of the documentation from the results"
    parser = commands.add_parser("tables", help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(run=_tables)
    documents = [Path(f"docs/{name}.md") for name in tables.DOCUMENTS]
    parser.add_argument(
        "--docs",
        type=Path,
        nargs="+",
        default=documents,
        metavar="FILE",
        help=f"documents (default {' '.join(map(str, documents))})",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder (default %(default)s)"
    )


def _contrast(options: argparse.Namespace) -> int:
    names = options.shapes + (list(cases.LARGE_CASES) if options.large else [])
    results = contrast.measure(names, **_settings(options))
    _write(results, options.output)
    broken = contrast.violations(results) if options.check else []
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return 2 if broken else 0


def _growth(options: argparse.Namespace) -> int:
    if options.largest < 1024:
        raise ValueError(f"--largest {options.largest}: below 1024 nothing grows yet")
    results = growth.measure(growth.sweeps(options.largest), **_settings(options))
    _write(results, options.output)
    if options.output is not None:
        growth.plot(results).savefig(options.output.with_suffix(".png"))
    return 0


def _projection(options: argparse.Namespace) -> int:
    size = {"batch": options.batch, "height": options.height, "width": options.width}
    scene = replace(cases.STREET, **size)
    results = projection.measure(scene, backbone=options.backbone, **_settings(options))
    _write(results, options.output)
    return 0


def _model(options: argparse.Namespace) -> int:
    work = models.step_of(
        options.files,
        batch=options.batch,
        size=options.size,
        precision=options.precision,
        compiled=options.compile,
    )
    measured = {options.files[0].stem: work}
    _write(models.measure(measured, **_settings(options)), options.output)
    return 0


def _gpu(options: argparse.Namespace) -> int:
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device: rehearse with --dry-run")
    from bench import gpu  # brings the profiler

    results = gpu.measure(
        gpu.DRY if options.dry_run else gpu.FULL,
        torch.device("cpu" if options.dry_run else "cuda"),
        seconds=options.seconds,
        tests=gpu.gpu_tests() if options.tests else (),
        keep=lambda found: _write(found, options.output),
        say=_say,
    )
    broken = [name for name, kept, _ in results["promises"] if kept is False]
    # A rehearsal's times say nothing.
    return 2 if results["failed"] or (broken and not options.dry_run) else 0


def _data(options: argparse.Namespace) -> int:
    if options.images < 1:
        raise ValueError(f"--images {options.images}: needs at least 1")
    from bench import data  # brings detectron2, which the other measurements do without

    _write(data.measure(images=options.images, **_settings(options)), options.output)
    return 0


def _evaluation(options: argparse.Namespace) -> int:
    if options.images < 1:
        raise ValueError(f"--images {options.images}: needs at least 1")
    from bench import evaluation  # brings detectron2, which the other measurements do without

    _write(evaluation.measure(images=options.images, **_settings(options)), options.output)
    return 0


def _tables(options: argparse.Namespace) -> int:
    for document in options.docs:
        document.write_text(tables.fill(document.read_text(), options.results))
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all measurements take."""
    if options.repeats < 1:
        raise ValueError(f"--repeats {options.repeats}: needs at least 1")
    torch.set_num_threads(options.threads)
    return {
        "device": torch.device(options.device),
        "rounds": options.repeats,
        "most_seconds": options.seconds,
        "say": _say,
    }


def _say(line: str) -> None:
    print(line, flush=True)


def _write(results: Mapping[str, Any], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
