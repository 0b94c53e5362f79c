#!/usr/bin/env python
"""Compare variants over seeds: collect finished runs into one JSON file and print a table.

Usage:
    python tools/summarize_runs.py --output results/camvid_cpu.json \\
        base=output/base_0 base=output/base_1 ms_cs=output/ms_cs_0 ms_cs=output/ms_cs_1
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
from contrast_d2.evaluation.summary import summarize_runs, summary_table


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="VARIANT=RUN_DIR",
        help="a finished run; the first variant is the reference",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the JSON file")
    options = parser.parse_args(arguments)
    variants: dict[str, list[Path]] = {}
    for run in options.runs:
        name, equals, folder = run.partition("=")
        if not (name and equals and folder):
            parser.error(f"{run!r} is not of the form VARIANT=RUN_DIR")
        variants.setdefault(name, []).append(Path(folder))
    try:
        result = summarize_runs(variants)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
