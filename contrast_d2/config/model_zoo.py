"""The experiment files that come with the package, by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from ..resources import resource

if TYPE_CHECKING:
    from omegaconf import DictConfig


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
    from detectron2.config import LazyConfig  # which `contrast_d2.contrast` does without

    from .yacs import load_yacs, tree_from_yacs

    folder = resource("configs")
    path = folder / name
    if not path.is_file():
        paths = [p for p in folder.glob("*/*.*") if p.parent.name not in ("common", "ablations")]
        files = [str(p.relative_to(folder)) for p in paths]
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.0)
        raise ValueError(f"there is no experiment file {name!r}. Did you mean {near[0]!r}?")
    if path.suffix == ".yaml":
        return tree_from_yacs(load_yacs(str(path)))
    return LazyConfig.load(str(path))
