#!/usr/bin/env python
"""Measure and draw the pixel embeddings of one or more trained models.

Usage:
    python tools/embeddings.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py \\
        --weights baseline=output/base/model_final.pth --weights output/ms_cs/model_final.pth \\
        --layer res5 --output output/embeddings

Several weights are compared on the same pixels. The folder gets embeddings.html, one PNG for each
plane, similarity.png and similarity_NAME.csv, suspects.csv, metrics.json and embeddings.npz.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import io
import json
import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
import numpy as np
import torch
from bench.machine import note
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from contrast_d2.engine import check_classes, load_config, load_trained
from contrast_d2.studio.embeddings import (
    PLANE_TITLES,
    PLANES,
    LayerTap,
    ModelStudy,
    PixelSet,
    Suspect,
    check_libraries,
    collect_pixels,
    is_projection,
    label_suspects,
    plot_class_similarity,
    plot_planes,
    projection_heads,
    short_names,
    study_model,
    write_page,
)
from contrast_d2.studio.embeddings.page import SCORE_TITLES
from contrast_d2.weights import read_weights


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="experiment file of all the weights")
    add(
        "--weights",
        required=True,
        action="append",
        metavar="[NAME=]FILE",
        help="checkpoint, with a name for it (else its folder's); repeated for a comparison",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder for what is written")
    add(
        "--layer",
        default="pre_logits",
        help="map of the backbone (res2 ...), of the decoder (p2, pre_logits ...), or embedding of "
        "the contrast's projector (contrast/res2 ...)",
    )
    add("--images", type=int, help="use so many, spread evenly over the data; all of them if unset")
    add("--per-class", type=int, default=300, help="most pixels of a class")
    add("--per-image", type=int, default=20, help="most pixels of a class in one image")
    add("--neighbours", type=int, default=10, help="how many vote on a pixel's class")
    add(
        "--apart",
        type=int,
        default=1,
        help="least distance of two images whose pixels may be neighbours, in a video above 1",
    )
    add(
        "--planes",
        default=",".join(PLANES),
        metavar="NAME,...",
        help="what to draw, the first one on top",
    )
    add("--suspects", type=int, default=60, help="most labels to list as possibly wrong")
    add("--page-points", type=int, default=4000, help="most points in the HTML file")
    add("--seed", type=int, default=0, help="of all random numbers")
    add("opts", nargs="*", metavar="key=value", help="changes to the config")
    return parser


def _run(options: argparse.Namespace) -> None:
    for name, least in (("images", 2), ("suspects", 0), ("page_points", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: needs {least} or more.")
    planes = options.planes.split(",")
    if unknown := [name for name in planes if name not in PLANES]:
        raise ValueError(f"--planes {options.planes}: {unknown[0]!r} is none of {list(PLANES)}.")
    check_libraries(planes)
    weights = _named_files(options.weights)
    cfg = load_config(options.config_file, options.opts)
    check_classes(cfg)
    options.output.mkdir(parents=True, exist_ok=True)
    taps = {name: _tap(cfg, file, options.layer) for name, file in weights.items()}
    meta = MetadataCatalog.get(cfg.dataset.test)
    names, colors = list(meta.stuff_classes), meta.stuff_colors
    pixels = _collect(cfg, taps, options)
    studies = _study(pixels, len(names), planes, options)
    suspects = label_suspects(
        [study.votes for study in studies.values()],
        pixels.labels,
        pixels.one_class,
        options.suspects,
    )
    _write_arrays(options.output / "embeddings.npz", pixels, studies)
    _write_similarity(options.output, studies, names)
    _write_suspects(options.output / "suspects.csv", pixels, studies, suspects, names)
    _write_metrics(options, cfg.dataset.test, pixels, studies, names)
    text = (
        f"{cfg.dataset.test}, layer {options.layer}: {len(pixels.labels):,} pixels of "
        f"{len(pixels.file_names):,} images, seed {options.seed}"
    )
    for plane in planes:
        points = {name: study.planes[plane] for name, study in studies.items()}
        title = f"{PLANE_TITLES[plane]} of {options.layer}, {cfg.dataset.test}"
        figure = plot_planes(points, pixels.labels, colors, names, title=title)
        figure.savefig(options.output / f"{plane}.png")
    write_page(
        options.output / "embeddings.html",
        pixels,
        studies,
        suspects,
        class_names=names,
        colors=colors,
        title=f"Embeddings: {', '.join(studies)}",
        note=f"{text}. Neighbours are {options.neighbours} pixels of other images"
        + (f", {options.apart} or more away in the data." if options.apart > 1 else "."),
        similarity_png=(options.output / "similarity.png").read_bytes(),
        most_points=options.page_points,
    )
    _print_scores(text, studies, options.output)


def _named_files(weights: Sequence[str]) -> dict[str, str]:
    """Files by name, of `NAME=FILE` or `FILE`."""
    files: dict[str, str] = {}
    for text in weights:
        name, _, file = text.rpartition("=")
        if Path(text).is_file():  # whose own name may have a "="
            name, file = "", text
        if not Path(file).is_file():
            raise ValueError(f"--weights {text}: there is no file {file}.")
        name = name or Path(file).resolve().parent.name
        if name in files:
            raise ValueError(f"--weights {text}: {name!r} is named twice: give NAME=FILE.")
        if "/" in name or not name.isprintable():
            raise ValueError(f"--weights {text}: {name!r} cannot be part of a file's name.")
        files[name] = file
    return files


def _tap(cfg: DictConfig, weights: str, layer: str) -> LayerTap:
    """Builds a model, with its projectors where the layer is theirs, and loads its weights."""
    model = load_trained(cfg, weights, keep_contrast=is_projection(layer))
    if is_projection(layer):
        _check_projector(model, weights, layer)
    return LayerTap(model, layer)


def _check_projector(model: torch.nn.Module, weights: str, layer: str) -> None:
    state = read_weights(weights)
    state = state.get("model", state)
    prefix = projection_heads(model)[layer] + "."
    missing = [name for name in model.state_dict() if name.startswith(prefix) and name not in state]
    if missing:
        raise ValueError(
            f"{weights} has no projector for {layer}, it lacks {missing[0]}: compare a layer that "
            "all weights have, such as the backbone's or pre_logits, or name a checkpoint that was "
            "trained with this contrast (model_inference.pth leaves it out)."
        )


def _collect(cfg: DictConfig, taps: dict[str, LayerTap], options: argparse.Namespace) -> PixelSet:
    test = cfg.dataloader.test
    test.mapper.is_train = True  # which reads the labels as well
    loader = instantiate(test)
    count = len(loader.dataset)
    indices = range(count)
    if options.images is not None and options.images < count:
        indices = np.linspace(0, count - 1, options.images).round().astype(int).tolist()
    samples = DataLoader(
        Subset(loader.dataset, indices), batch_size=None, num_workers=loader.num_workers
    )
    return collect_pixels(
        taps,
        tqdm(samples, "images", disable=None),
        num_classes=cfg.dataset.num_classes,
        ignore_label=MetadataCatalog.get(cfg.dataset.test).ignore_label,
        per_class=options.per_class,
        per_image=options.per_image,
        seed=options.seed,
        image_format=test.mapper.get("image_format", "RGB"),
    )


def _study(
    pixels: PixelSet, num_classes: int, planes: Sequence[str], options: argparse.Namespace
) -> dict[str, ModelStudy]:
    return {
        name: study_model(
            pixels.embeddings[name],
            pixels.predictions[name],
            pixels.labels,
            pixels.image,
            num_classes=num_classes,
            neighbours=options.neighbours,
            apart=options.apart,
            planes=planes,
            seed=options.seed,
        )
        for name in tqdm(pixels.embeddings, "models", disable=None)
    }


def _write_arrays(path: Path, pixels: PixelSet, studies: dict[str, ModelStudy]) -> None:
    arrays: dict[str, np.ndarray] = {
        "labels": pixels.labels,
        "image": pixels.image,
        "position": pixels.position,
        "one_class": pixels.one_class,
        "file_names": np.array(short_names(pixels.file_names)),
    }
    for name, study in studies.items():
        arrays[f"embeddings {name}"] = pixels.embeddings[name]
        arrays[f"predictions {name}"] = pixels.predictions[name]
        arrays |= {f"{plane} {name}": points for plane, points in study.planes.items()}
    np.savez(path, **arrays)


def _write_similarity(output: Path, studies: dict[str, ModelStudy], names: list[str]) -> None:
    matrices = {name: study.class_similarity for name, study in studies.items()}
    picture = io.BytesIO()
    plot_class_similarity(matrices, names).savefig(picture, format="png")
    (output / "similarity.png").write_bytes(picture.getvalue())
    for name, matrix in matrices.items():
        with open(output / f"similarity_{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["", *names])
            for row_name, row in zip(names, matrix, strict=True):
                writer.writerow([row_name, *("" if math.isnan(v) else f"{v:.4f}" for v in row)])


def _write_suspects(
    path: Path,
    pixels: PixelSet,
    studies: dict[str, ModelStudy],
    suspects: list[Suspect],
    names: list[str],
) -> None:
    models = [f"{kind} {name}" for name in studies for kind in ("neighbours", "predicted")]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "x", "y", "label", "vote", "vote_share", "label_share", *models])
        for suspect in suspects:
            i = suspect.pixel
            row = [pixels.file_names[pixels.image[i]], *pixels.position[i].tolist()]
            row += [names[pixels.labels[i]], names[suspect.vote]]
            row += [f"{suspect.vote_share:.3f}", f"{suspect.label_share:.3f}"]
            for name, study in studies.items():
                row += [names[study.neighbour_class[i]], names[pixels.predictions[name][i]]]
            writer.writerow(row)


def _write_metrics(
    options: argparse.Namespace,
    dataset: str,
    pixels: PixelSet,
    studies: dict[str, ModelStudy],
    names: list[str],
) -> None:
    machine = note(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for library in ("openTSNE", "umap-learn", "scikit-learn"):
        with suppress(importlib.metadata.PackageNotFoundError):
            machine["versions"][library] = importlib.metadata.version(library)
    settings = ("layer", "per_class", "per_image", "neighbours", "apart", "seed")
    drawn = np.bincount(pixels.labels, minlength=len(names)).tolist()
    report: dict[str, Any] = {
        **machine,
        "config_file": options.config_file,
        "weights": options.weights,
        "dataset": dataset,
        **{name: getattr(options, name) for name in settings},
        "images": len(pixels.file_names),
        "pixels": dict(zip(names, drawn, strict=True)),
        "models": {
            name: {
                key: round(value, 4) if math.isfinite(value) else None
                for key, value in study.scores.items()
            }
            for name, study in studies.items()
        },
    }
    text = json.dumps(report, indent=2, allow_nan=False)
    (options.output / "metrics.json").write_text(text + "\n", encoding="utf-8")


def _print_scores(text: str, studies: dict[str, ModelStudy], output: Path) -> None:
    width = max(len(title) for title in SCORE_TITLES.values())
    print(text)
    print(" " * width, *(f"{name:>12}" for name in studies))
    for key, title in SCORE_TITLES.items():
        print(f"{title:{width}}", *(f"{study.scores[key]:12.3f}" for study in studies.values()))
    print(f"written: {output / 'embeddings.html'} and what is beside it")


if __name__ == "__main__":
    sys.exit(main())
