"""The experiment files and programs that come with the package."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

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
        The path itself where there is such a file, or where no installed file goes by it.
    """
    name = os.path.normpath(path).split(os.sep)
    if os.path.isfile(path) or name[0] != "configs":
        return path
    try:
        packaged = resource("configs").joinpath(*name[1:])
    except ValueError:
        return path
    return str(packaged) if packaged.is_file() else path


def get_config(name: str) -> DictConfig:
    """Loads an experiment file that comes with the package, for another one to build on.

    In an experiment file of your own, anywhere on disk:

        from contrast_d2 import get_config

        _base = get_config("camvid/semfpn_r18_ms_cs_6k.py")
        dataloader, dataset, model = _base.dataloader, _base.dataset, _base.model
        lr_multiplier, optimizer, train = _base.lr_multiplier, _base.optimizer, _base.train
        train.output_dir = "output/mine"

    Args:
        name: of the file below `configs/`.

    Raises:
        ValueError: there is no such file.

    Reference: `detectron2.model_zoo.get_config`.
    """
    from .engine.config import load_config  # which imports all that experiments need

    folder = resource("configs")
    path = folder / name
    if not path.is_file():
        files = [str(p.relative_to(folder)) for p in folder.glob("*/*.*") if p.parent != "common"]
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.0)
        raise ValueError(f"there is no experiment file {name!r}. Did you mean {near[0]!r}?")
    return load_config(str(path))
