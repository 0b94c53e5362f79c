#!/usr/bin/env python
"""Count what models cost, part by part, and prove that contrast costs nothing at test time.

Usage:
    python tools/analyze_model.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py
    python tools/analyze_model.py --size 512 1024 --output results/models.json \\
        --config-file configs/*/*_ms_cs_[0-9]*k.py

The table of docs/models.md is made from results/models.json by `tools/benchmark.py tables`.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
import torch
from bench.machine import note
from bench.models import crop_of
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf

from contrast_d2.backbones import without_starting_weights
from contrast_d2.engine import load_config
from contrast_d2.segmentor import ContrastiveSegmentor
from contrast_d2.studio.analysis import ModelCost, analyze, inference_differences


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 1 for a mistake, 2 where contrast changes what runs at test time.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--config-file", nargs="+", required=True, metavar="FILE", help="experiment files"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the image (default: the crop that each is trained on)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the results as JSON"
    )
    parser.add_argument("opts", nargs="*", metavar="key=value", help="changes to the configs")
    options = parser.parse_args(arguments)
    # An option that takes several files also takes what follows them.
    files = [name for name in options.config_file if "=" not in name]
    overrides = [name for name in options.config_file if "=" in name] + options.opts
    try:
        # Mistakes are told before minutes of work.
        configs = {file: load_config(file, overrides) for file in files}
        sizes = {file: _size(file, cfg, options.size) for file, cfg in configs.items()}
        models = {
            Path(file).stem: _measure(file, cfg, sizes[file]) | {"overrides": overrides}
            for file, cfg in configs.items()
        }
        if options.output is not None:
            results = {**note(torch.device("cpu")), "models": models}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 2 if any(model["inference_differences"] for model in models.values()) else 0


def _size(file: str, cfg: DictConfig, size: Sequence[int] | None) -> Sequence[int]:
    size = crop_of(file, cfg) if size is None else size
    if min(size) < 1:
        raise ValueError(f"--size {size[0]} {size[1]}: both must be at least 1.")
    return size


def _measure(file: str, cfg: DictConfig, size: Sequence[int]) -> dict[str, Any]:
    segmentor = _build(cfg)
    contrast = segmentor.contrast
    differences = None
    if contrast is not None:
        cfg.model.contrast = None
        differences = inference_differences(segmentor, _build(cfg), size)
    cost = analyze(segmentor, size)
    print(f"\n{file}, {cfg.dataset.num_classes} classes, an image of {size[0]}x{size[1]}")
    print(_table(cost))
    print(_verdict(differences))
    return {
        "file": file,
        "backbone": OmegaConf.select(cfg, "model.backbone.name"),  # a yaml config has no such key
        "decoder": type(segmentor.sem_seg_head).__name__,
        "contrast": None if contrast is None else type(contrast).__name__,
        "num_classes": cfg.dataset.num_classes,
        "size": list(size),
        "inference": {name: part._asdict() for name, part in cost.inference.items()},
        "training_only": {name: part._asdict() for name, part in cost.training_only.items()},
        "uncounted": cost.uncounted,
        "inference_differences": differences,
    }


def _build(cfg: DictConfig) -> ContrastiveSegmentor:
    """The config's model with random weights: what it costs does not depend on them."""
    torch.manual_seed(0)
    return instantiate(without_starting_weights(cfg.model))


def _table(cost: ModelCost) -> str:
    lines = [f"  {'':32}{'parameters, M':>14}{'GFLOPs':>12}{'activations, M':>16}"]
    for title, parts in (("inference", cost.inference), ("training only", cost.training_only)):
        total = [sum(column) for column in zip(*parts.values(), strict=True)] or [0, 0, 0]
        lines.append(_row(title, total))
        lines += [_row(f"  {name}", part) for name, part in parts.items()]
    lines.append(f"  a multiply-add counts once; not counted: {_listed(cost.uncounted)}")
    return "\n".join(lines)


def _row(name: str, numbers: Sequence[int]) -> str:
    parameters, flops, activations = numbers
    return f"  {name:32}{parameters / 1e6:14.3f}{flops / 1e9:12.3f}{activations / 1e6:16.3f}"


def _listed(operations: Mapping[str, int]) -> str:
    listed = (f"{name.removeprefix('aten::')} ({n})" for name, n in sorted(operations.items()))
    return ", ".join(listed) or "nothing"


def _verdict(differences: Sequence[str] | None) -> str:
    if differences is None:
        return "  no contrast method in this file: nothing to compare"
    if differences:
        return "\n".join(f"  with contrast, inference is another: {line}" for line in differences)
    return "  without contrast: the same graph, the same FLOPs, the same scores bit for bit"


if __name__ == "__main__":
    sys.exit(main())
