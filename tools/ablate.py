#!/usr/bin/env python
"""Train variants of an experiment over seeds, and compare them.

Usage:
    python tools/ablate.py configs/ablations/shapes.yaml
    python tools/ablate.py configs/ablations/camvid_table1a_cpu.yaml --seeds 0 --parallel 2
    python tools/ablate.py configs/ablations/camvid_table1a_cpu.yaml --status

A definition is a yaml file: a title, a baseline, seeds, and variants, each an experiment file with
overrides. Every variant is trained with every seed by train_net.py, in a process and a folder of
its own. The same command continues an ablation that was stopped: finished cells are not trained
again, others resume from their last checkpoint. It may run several times at once. What is finished
at its end is written to results/NAME.json and NAME.png, and as a page to the ablation's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
import torch
from bench.machine import note
from detectron2.config import instantiate
from tqdm import tqdm

from contrast_d2.backbones import without_starting_weights
from contrast_d2.engine import load_config
from contrast_d2.resources import find_config
from contrast_d2.studio.ablation import (
    Ablation,
    Cell,
    Failure,
    Found,
    ablation_table,
    collect_results,
    examine,
    plan_cells,
    plot_variants,
    read_definition,
    train_cells,
    write_page,
)

PROGRAM = Path(__file__).resolve().parents[1] / "train_net.py"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    try:
        ablation = read_definition(find_config(str(options.definition)))
        cells = plan_cells(ablation, options.output, load_config)
        chosen = _chosen(ablation, cells, options)
        parameters = count_parameters(ablation)
        found = examine(chosen, options.ignore)
        if options.status:
            print("\n".join(_lines(chosen, found)))
            return 0
        _refuse_changed(chosen, found)
        unfinished = [c for c, f in zip(chosen, found, strict=True) if f.state != "finished"]
        print(f"{ablation.name}: {len(chosen)} cells, {len(unfinished)} to train", flush=True)
        failures = train(unfinished, options)
        for cell, reason, log in failures:
            print(f"error: {cell.name}: {reason} ({log})", file=sys.stderr)
        write_results(ablation, cells, parameters, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues", file=sys.stderr)
        return 1
    return int(bool(failures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("definition", type=Path, help="a file as those under configs/ablations/")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="only these")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="cells at a time (default 1)"
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of each cell; without GPUs its processes (default 1)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/ablations"),
        metavar="DIR",
        help="folder of all ablations (default output/ablations)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder of NAME.json and NAME.png (default results)",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="KEY",
        help="settings in which an earlier run may differ, since they change nothing, such as one "
        "that a later version has added",
    )
    parser.add_argument("--status", action="store_true", help="only say what is finished")
    return parser


def _chosen(ablation: Ablation, cells: list[Cell], options: argparse.Namespace) -> list[Cell]:
    names = [variant.name for variant in ablation.variants]
    for given, known, flag in (
        (options.seeds, ablation.seeds, "--seeds"),
        (options.variants, names, "--variants"),
    ):
        unknown = [value for value in given or [] if value not in known]
        if unknown:
            raise ValueError(
                f"{flag} {unknown[0]}: {options.definition} has {', '.join(map(str, known))}."
            )
    return [
        cell
        for cell in cells
        if cell.seed in (options.seeds or ablation.seeds)
        and cell.variant in (options.variants or names)
    ]


def count_parameters(ablation: Ablation) -> dict[str, tuple[int, int]]:
    """Builds every variant's model, without memory for its weights, so that none fails later.

    Returns:
        By variant, how many numbers are trained, and how many of them are the contrast method's.

    Raises:
        ValueError: a model cannot be built.
    """
    counts = {}
    for variant in ablation.variants:
        config = without_starting_weights(load_config(variant.config, variant.overrides).model)
        try:
            with torch.device("meta"):
                model = instantiate(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"variant {variant.name}: {error}") from error
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        contrast = sum(count for n, count in trained.items() if n.startswith("contrast."))
        counts[variant.name] = sum(trained.values()), contrast
    return counts


def _lines(cells: list[Cell], found: list[Found]) -> list[str]:
    lines = []
    for cell, what in zip(cells, found, strict=True):
        lines.append(f"{what.state:<8}  {cell.name:<32}  {what.folder}")
        lines += [f"{'':8}    {difference}" for difference in what.differences]
    return lines


def _refuse_changed(cells: list[Cell], found: list[Found]) -> None:
    for cell, what in zip(cells, found, strict=True):
        if what.state == "changed":
            more = len(what.differences) - 1
            raise ValueError(
                f"{what.folder} was trained with other settings: {what.differences[0]}"
                f"{f', and {more} more (--status lists them)' if more else ''}. Move the folder "
                f"away, give {cell.variant} another name, or --ignore what changes nothing."
            )


def train(cells: list[Cell], options: argparse.Namespace) -> list[Failure]:
    """Trains what is not finished, under a bar of iterations with the time that is left."""
    done = dict.fromkeys((cell.name for cell in cells), 0)
    total = sum(cell.iterations for cell in cells)
    # In a log each state of the bar is a line.
    period = 1.0 if sys.stderr.isatty() else 60.0
    with tqdm(total=total, unit="it", disable=not cells, mininterval=period, smoothing=0) as bar:

        def progress(iterations: Mapping[str, int], line: str) -> None:
            for name, count in iterations.items():
                if line.endswith(": training"):
                    bar.initial += count  # of an earlier start, for which no time has passed
                bar.update(count - done[name])
                done[name] = count
            if line:
                bar.write(line)
            finished = sum(done[cell.name] >= cell.iterations for cell in cells)
            bar.set_postfix_str(f"{finished} of {len(cells)} cells", refresh=False)

        return train_cells(
            cells,
            # As people write it, since the run notes its command.
            PROGRAM.relative_to(Path.cwd()) if PROGRAM.parent == Path.cwd() else PROGRAM,
            parallel=options.parallel,
            options=["--num-gpus", str(options.num_gpus)] if options.num_gpus != 1 else [],
            environments=_environments(options.parallel, options.num_gpus),
            progress=progress,
        )


def _environments(parallel: int, num_gpus: int) -> list[dict[str, str]]:
    """Shares GPUs, or else cores, among the cells that are trained at a time."""
    count = torch.cuda.device_count()
    if not count:
        if "OMP_NUM_THREADS" in os.environ or parallel * num_gpus == 1:
            return [{}]
        return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (parallel * num_gpus)))}]
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names if len(names) == count and names[0] else [str(i) for i in range(count)]
    if num_gpus > count:
        raise ValueError(f"--num-gpus {num_gpus}: this machine has {count}.")
    places = []
    for place in range(parallel):
        own = [names[(place * num_gpus + i) % count] for i in range(num_gpus)]
        places.append({"CUDA_VISIBLE_DEVICES": ",".join(own)})
    return places


def write_results(
    ablation: Ablation,
    cells: list[Cell],
    parameters: Mapping[str, tuple[int, int]],
    options: argparse.Namespace,
) -> dict[str, Any] | None:
    """Writes what is finished of all cells, and prints the table; None where that is too little."""
    folders: dict[str, list[Path]] = {}
    for cell, what in zip(cells, examine(cells, options.ignore), strict=True):
        if what.state == "finished":
            folders.setdefault(cell.variant, []).append(what.folder)
    if ablation.baseline not in folders:
        print(f"no results yet: the baseline {ablation.baseline} has no finished cell")
        return None
    result = collect_results(ablation, folders, parameters)
    made = note(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result = {**made, **result}
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{ablation.name}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    plot_variants(result).savefig(path.with_suffix(".png"))
    page = options.output / ablation.name / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, result)
    print(f"{ablation_table(result)}\n\n{path}, {path.with_suffix('.png')}, {page}")
    return result


if __name__ == "__main__":
    sys.exit(main())
