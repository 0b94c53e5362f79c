#!/usr/bin/env python
"""Write MODEL_ZOO.md from results/ and the definitions of ablations.

Usage:
    python tools/model_zoo.py
    python tools/model_zoo.py --check    # writes nothing; fails where it would change
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
from contrast_d2.studio.ablation import model_zoo


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parents[1],
        metavar="DIR",
        help="the repository (default: the one that holds this tool)",
    )
    options = parser.parse_args(arguments)
    path = options.root / "MODEL_ZOO.md"
    try:
        if not (options.root / "results").is_dir():
            raise ValueError(f"{options.root} has no results: name a checkout of the repository.")
        text = model_zoo(options.root)
        if options.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            raise ValueError(f"{path} is not what results say: run python tools/model_zoo.py.")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
