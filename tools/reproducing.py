#!/usr/bin/env python
"""Write the heads of the papers' experiment files and docs/reproducing.md from configs/ledger.yaml.

Usage:
    python tools/reproducing.py
    python tools/reproducing.py --check    # writes nothing; fails where it would change
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
from contrast_d2.studio.ledger import Ledger, generated


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parents[1],
        metavar="DIR",
        help="the repository (default: the one that holds this tool)",
    )
    options = parser.parse_args(arguments)
    try:
        ledger = Ledger(options.root / "configs/ledger.yaml")
        files = generated(ledger, options.root)
        changed = [path for path, text in files.items() if path.read_text(encoding="utf-8") != text]
        if options.check and changed:
            raise ValueError(
                f"{len(changed)} files are not what the ledger says, such as {changed[0]}: run "
                "python tools/reproducing.py."
            )
        for path in changed:
            path.write_text(files[path], encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
