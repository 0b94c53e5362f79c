"""yaml configs: the experiments that they stand for, and detectron2's own trainer on one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, configurable, get_cfg, instantiate
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import SemSegEvaluator
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from contrast_d2 import add_contrast_config
from contrast_d2.backbones import without_starting_weights
from contrast_d2.evaluation.runs import load_saved_config
from contrast_d2.yacs import ReadKeys, flat, load_yacs, tree_from_yacs

from .tiny import TinyBackbone

ROOT = Path(__file__).parents[1]
CAMVID = ROOT / "configs/camvid"
FILES = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.parent.name != "ablations"]
PAIRS = [path for path in FILES if path.with_suffix(".py").exists()]
BASE, MS_CS = (str(CAMVID / f"semfpn_r18_{name}_6k.yaml") for name in ("base", "ms_cs"))
OFFLINE = ["MODEL.BACKBONE.OPTIONS.PRETRAINED", "False"]


def tree_of(path: str, *overrides: str) -> DictConfig:
    return tree_from_yacs(load_yacs(path, [*OFFLINE, *overrides]))


def batch() -> list[dict[str, torch.Tensor]]:
    """Two images with labels of 11 classes in squares of 8 pixels."""
    labels = torch.randint(0, 11, (2, 8, 12)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    return [{"image": image, "sem_seg": label} for image, label in zip(images, labels, strict=True)]


def groups(cfg: DictConfig, model: nn.Module) -> list[dict[str, Any]]:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    settings = ("lr", "momentum", "nesterov", "weight_decay")
    return [{key: g[key] for key in settings} for g in optimizer.param_groups for _ in g["params"]]


def explicit(node: Any) -> Any:
    """A saved config with the defaults of all calls, for comparison."""
    if isinstance(node, dict):
        target = node.get("_target_")
        parameters = inspect.signature(locate(target)).parameters if target else {}
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        return {key: explicit(value) for key, value in {**defaults, **node}.items()}
    return [explicit(value) for value in node] if isinstance(node, (list, tuple)) else node


def saved(cfg: DictConfig, path: Path) -> DictConfig:
    """A config as a run saves it, and others read it."""
    LazyConfig.save(cfg, str(path))
    return load_saved_config(path)


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_a_yaml_file_is_the_experiment_of_its_python_file(path: Path, tmp_path: Path) -> None:
    python = saved(LazyConfig.load(str(path.with_suffix(".py"))), tmp_path / "python.yaml")
    bridged = saved(tree_of(str(path)), tmp_path / "config.yaml")
    python.model = without_starting_weights(python.model)
    for key in ("train", "dataset", "dataloader"):
        ours, theirs = (OmegaConf.to_container(cfg)[key] for cfg in (bridged, python))
        assert explicit(ours) == explicit(theirs), key

    models = [instantiate(cfg.model).train() for cfg in (python, bridged)]
    models[1].load_state_dict(models[0].state_dict())
    inputs, losses = batch(), []
    for model in models:
        torch.manual_seed(0)
        losses.append(model(inputs))
    assert len(losses[0]) > 1 or "base" in path.stem
    torch.testing.assert_close(losses[0], losses[1])
    assert groups(bridged, models[1]) == groups(python, models[0])
    schedules = [instantiate(cfg.lr_multiplier) for cfg in (python, bridged)]
    assert schedules[0](0.3) == schedules[1](0.3) != 1
