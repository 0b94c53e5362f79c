#!/usr/bin/env python
"""Copy the experiment files that come with contrast_d2 to a folder, to change and extend them.

Usage:
    python tools/copy_configs.py my_project/configs
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from contrast_d2.resources import resource


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    target = parser.parse_args(argv).folder
    try:
        if target.exists():
            raise ValueError(f"{target} is there already: name a new folder.")
        shutil.copytree(resource("configs"), target, ignore=shutil.ignore_patterns("__pycache__"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(list(target.rglob('*.py')))} files in {target}")


if __name__ == "__main__":
    main()
