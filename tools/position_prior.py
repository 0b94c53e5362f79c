#!/usr/bin/env python
"""Score the trivial predictor: the most frequent training class at each pixel position.

Usage:
    python tools/position_prior.py --train camvid_sem_seg_train --eval camvid_sem_seg_val
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
import torch
from bench.machine import note

import contrast_d2.data  # noqa: F401  (registers the datasets)
from contrast_d2.evaluation import evaluate_position_prior
from contrast_d2.evaluation.metrics import finite_scores


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", required=True, help="dataset whose labels are counted")
    parser.add_argument("--eval", required=True, help="dataset that is predicted and scored")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the scores as JSON")
    options = parser.parse_args(arguments)
    try:
        scores = evaluate_position_prior(options.train, options.eval)["sem_seg"]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.output:
        report = {
            **note(torch.device("cpu")),
            "command": f"python tools/position_prior.py --train {options.train} "
            f"--eval {options.eval} --output {options.output}",
            "predictor": "most frequent training class at each pixel position",
            "train": options.train,
            "eval": options.eval,
            "sem_seg": finite_scores(scores),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"mIoU {scores['mIoU']:.2f} on {options.eval}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
