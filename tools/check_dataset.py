#!/usr/bin/env python
"""Check the files, label values and classes of a dataset, and whether its labels fit the images.

Usage:
    python tools/check_dataset.py camvid
    python tools/check_dataset.py cityscapes_fine_sem_seg_val --workers 8
    python tools/check_dataset.py path/to/my_data --html report.html

The exit status is 1 where training would fail or learn something wrong, and 0 otherwise.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
from contrast_d2.data.check import check_dataset, text_report
from contrast_d2.studio.dataset_report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "dataset",
        metavar="NAME|FOLDER",
        help="registered dataset, with or without its split, or a folder with a dataset.json",
    )
    parser.add_argument("--html", metavar="FILE", help="write a report with pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    try:
        if options.html:  # not after an hour of reading
            _check_writable(options.html)
        checked = check_dataset(options.dataset, workers=options.workers)
        print(text_report(checked))
        if options.html:
            write_report(options.html, checked, options.dataset)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: stopped before all files were read", file=sys.stderr)
        return 130
    return int(checked.has_errors)


def _check_writable(path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ValueError(f"--html {path} cannot be written: name a file in a folder that exists")


if __name__ == "__main__":
    sys.exit(main())
