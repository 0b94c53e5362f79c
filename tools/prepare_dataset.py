#!/usr/bin/env python
"""Turn the official download of a dataset into label files that can be trained on.

Usage:
    python tools/prepare_dataset.py cityscapes
    python tools/prepare_dataset.py ade20k --root /data --workers 8

Where each download belongs is in docs/datasets.md. Files that are there are not written again, so
that a stopped run is gone on with by the same command.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# detectron2 reads this when it is imported.
if __name__ == "__main__":
    _root = argparse.ArgumentParser(add_help=False)
    _root.add_argument("--root", default=os.environ.get("DETECTRON2_DATASETS", "datasets"))
    os.environ["DETECTRON2_DATASETS"] = _root.parse_known_args()[0].root

# ruff: noqa: E402
from contrast_d2.data.preparations import PREPARATIONS
from contrast_d2.data.prepare import run_plan


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=sorted(PREPARATIONS), metavar="NAME", help="%(choices)s")
    parser.add_argument(
        "--root", metavar="DIR", help="folder of the datasets (default: $DETECTRON2_DATASETS)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    parser.add_argument(
        "--partial", action="store_true", help="take a download that lacks images or splits"
    )
    options = parser.parse_args(arguments)
    if options.root:
        os.environ["DETECTRON2_DATASETS"] = options.root
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    try:
        summary = run_plan(
            PREPARATIONS[options.name](),
            workers=options.workers,
            partial=options.partial,
            title=options.name,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if summary.written or summary.present:
        print(f"{summary.written:,} label files written, {summary.present:,} were there")
    for name, count in summary.images.items():
        print(f"{name}: {count:,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
