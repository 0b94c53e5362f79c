#!/usr/bin/env python
"""Draw what a training run learned: prediction overlays, loss curves and per-class IoU.

Usage:
    python tools/plot_run.py output/demo
    python tools/plot_run.py output/baseline output/ms_cs --images 0 --output output/compared
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from pathlib import Path

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
import numpy as np
from detectron2.data import MetadataCatalog

from contrast_d2.data.datasets import read_records
from contrast_d2.data.labels import load_labels
from contrast_d2.data.reading import read_rgb
from contrast_d2.deploy.predictor import load_predictor
from contrast_d2.engine import last_checkpoint
from contrast_d2.evaluation.runs import last_scores, read_metrics
from contrast_d2.studio.visualize import comparison_panel, plot_class_iou, plot_curves


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output folders")
    parser.add_argument("--images", type=int, default=4, help="test images to predict (default 4)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: the first RUN_DIR")
    options = parser.parse_args(arguments)
    if options.images < 0:
        parser.error(f"--images {options.images} must not be negative")
    try:
        lines = plot_runs(options.runs, options.images, options.output or options.runs[0])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def plot_runs(run_dirs: list[Path], num_images: int, output: Path) -> list[str]:
    """Draw the pictures of some runs.

    Args:
        run_dirs: output folders of training runs.
        num_images: how many test images each run predicts, spread evenly over its test set.
        output: folder for the pictures.

    Returns:
        One line per run with its mIoU, and one that names the pictures.

    Raises:
        ValueError: a run's files are missing or cannot be used.
    """
    labels = _labels(run_dirs)
    for run_dir in run_dirs:
        if not run_dir.is_dir():
            raise ValueError(f"{run_dir} does not exist or is no folder; name the output folder")
    runs = dict(zip(labels, run_dirs, strict=True))
    metrics = {label: read_metrics(folder / "metrics.json") for label, folder in runs.items()}
    scores = {label: last_scores(folder, metrics[label]) for label, folder in runs.items()}
    evaluated = {label: found for label, found in scores.items() if found}

    figures = {"curves.png": plot_curves(metrics)}
    if evaluated:
        figures["class_iou.png"] = plot_class_iou({k: v.scores for k, v in evaluated.items()})
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / name)
    names = list(figures)
    for label, run_dir in runs.items():
        prefix = "prediction_" if len(run_dirs) == 1 else f"prediction_{_file_name(label)}_"
        names += plot_predictions(run_dir, num_images, output, prefix)

    lines = []
    for label, found in scores.items():
        run = "" if len(run_dirs) == 1 else f"{label}: "
        score = f"{found.scores['mIoU']:.2f} on {found.dataset}" if found else "not evaluated yet"
        lines.append(f"{run}mIoU {score}")
    return [*lines, f"pictures: {output}: {', '.join(sorted(names))}"]


def plot_predictions(run_dir: Path, num_images: int, output: Path, prefix: str) -> list[str]:
    """Predict test images with a run's newest weights and draw them; returns the file names."""
    if num_images == 0:
        return []
    predictor = load_predictor(str(run_dir / "config.yaml"), last_checkpoint(str(run_dir)))
    meta = MetadataCatalog.get(predictor.dataset_name)
    records = read_records(predictor.dataset_name)
    names = []
    # Neighbours in a video look alike, so take images that are far apart.
    count = min(num_images, len(records))
    for index in np.linspace(0, len(records) - 1, count).round().astype(int):
        record = records[int(index)]
        name = str(record.get("image_id") or Path(record["file_name"]).stem)
        image = read_rgb(record["file_name"])
        figure = comparison_panel(
            image,
            load_labels(record["sem_seg_file_name"], predictor.label_map),
            predictor(image),
            colors=meta.stuff_colors,
            class_names=meta.stuff_classes,
            ignore_label=meta.ignore_label,
            title=name,
        )
        names.append(f"{prefix}{_file_name(name)}.png")
        figure.savefig(output / names[-1])
    return names


def _labels(run_dirs: list[Path]) -> list[str]:
    """Name runs by their folder; by the whole path where folders share a name."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    unique = len(set(names)) == len(names)
    labels = names if unique else [str(run_dir) for run_dir in run_dirs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"a run is named twice: {', '.join(labels)}")
    return labels


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-")


if __name__ == "__main__":
    sys.exit(main())
