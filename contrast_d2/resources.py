"""The experiment files and programs that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent


def resource(name: str) -> Path:
    """Where something of the repository's root lies: in a wheel in the package's folder `share`, in
    a checkout beside the package.

    Args:
        name: `configs`, `tools` or `train_net.py`.

    Raises:
        ValueError: this installation has no such thing.
    """
    root = PACKAGE.parent
    # Beside an installed package lie those of others, whose `tools` is not ours.
    places = [PACKAGE / "share", *([root] if (root / "setup.py").is_file() else [])]
    for place in places:
        if (place / name).exists():
            return place / name
    raise ValueError(
        f"{name} did not come with contrast_d2 at {PACKAGE}: install it from its wheel, or with "
        "pip install -e in a checkout."
    )


def find_config(path: str) -> str:
    """The experiment file of a path, which may lie among those that come with the package.

    Args:
        path: of a file, or `configs/...`.

    Returns:
        The path itself where there is such a file, or where none of that name is installed.
    """
    name = os.path.normpath(path).split(os.sep)
    if os.path.isfile(path) or name[0] != "configs":
        return path
    try:
        packaged = resource("configs").joinpath(*name[1:])
    except ValueError:
        return path
    return str(packaged) if packaged.is_file() else path
