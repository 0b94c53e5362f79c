#!/usr/bin/env python
"""Write the network of an experiment file, as it is used at test time, to a file of its own.

Usage:
    python tools/export_model.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py \\
        --weights output/camvid/semfpn_r18_ms_cs_6k/model_final.pth --output model.onnx --check
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
import torch
from torch import Tensor

from contrast_d2.deploy.export import (
    InferenceModel,
    compare,
    export_program,
    onnx_bytes,
    onnx_runner,
    shapes_to_check,
)
from contrast_d2.engine import load_config, load_trained
from contrast_d2.files import write_atomically

_ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 1 for a mistake, 2 where `--check` finds other scores than the model's.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config-file", required=True, metavar="FILE", help="experiment file")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint")
    parser.add_argument("--format", choices=list(_ENDINGS), default="onnx", help="default: onnx")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="what to write")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="the only size that the exported network takes (default: any)",
    )
    parser.add_argument("--check", action="store_true", help="compare what is written with PyTorch")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="changes to the config")
    options = parser.parse_args(arguments)
    try:
        return _export(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _export(options: argparse.Namespace) -> int:
    ending = _ENDINGS[options.format]
    if options.output.suffix != ending:
        raise ValueError(f"--output {options.output}: files of this format end in {ending}.")
    if not Path(options.weights).is_file():
        raise ValueError(f"--weights {options.weights}: there is no such file.")
    model = _load(options.config_file, options.weights, options.opts)
    program = export_program(model, size=options.size)
    if options.format == "onnx":
        content = onnx_bytes(program)
    else:
        file = io.BytesIO()
        torch.export.save(program, file)
        content = file.getvalue()
    if options.check and not _agrees(_runner(options.format, content), model, options.size):
        print("error: that is more than rounding explains; nothing is written.", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(options.output), lambda file: file.write(content))
    size = "any size" if options.size is None else "{}x{}".format(*options.size)
    print(f"{options.output}: {len(content) / 1e6:.1f} MB, for images of {size}")
    return 0


def _load(config_file: str, weights: str, overrides: list[str]) -> InferenceModel:
    cfg = load_config(config_file, overrides)
    return InferenceModel(load_trained(cfg, weights, device="cpu"))


def _runner(kind: str, content: bytes) -> Callable[[Tensor], Tensor]:
    if kind == "onnx":
        return onnx_runner(content)
    return torch.export.load(io.BytesIO(content)).module()


def _agrees(run: Callable[[Tensor], Tensor], model: InferenceModel, size: list[int] | None) -> bool:
    found = compare(run, model, shapes_to_check(model, size))
    for difference in found:
        count, _, height, width = difference.shape
        print(
            f"  {count} x {height}x{width}: largest difference {difference.largest:.1e} of the "
            f"largest score, the same class in {difference.argmax:.2%} of the pixels"
        )
    return all(difference.is_rounding for difference in found)


if __name__ == "__main__":
    sys.exit(main())
