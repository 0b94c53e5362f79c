"""Loading experiment files and the overrides of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import LazyConfig, instantiate

from contrast_d2.engine import load_config

CONFIG = str(Path(__file__).parents[2] / "configs/shapes/semfpn_r18_ms_cs_demo.py")


def test_overrides_reach_every_level_and_type() -> None:
    cfg = load_config(
        CONFIG,
        [
            "train.max_iter=7",
            "optimizer.lr=1e-3",
            "model.contrast.scale_weights.res3=0",
            "dataloader.train.mapper.augmentations.crop_size=[64,96]",
            "model.contrast.cross_scale.0.2=0.5",
            "train.output_dir=some/folder",
        ],
    )
    assert cfg.train.max_iter == 7
    assert cfg.optimizer.lr == 1e-3
    assert cfg.model.contrast.scale_weights.res3 == 0
    assert cfg.dataloader.train.mapper.augmentations.crop_size == [64, 96]
    assert cfg.model.contrast.cross_scale[0][2] == 0.5
    assert cfg.dataloader.evaluator.output_dir == "some/folder/inference/shapes_sem_seg_val"


@pytest.mark.parametrize("none", ["None", "null"])
def test_none_switches_the_contrast_off(none: str) -> None:
    assert load_config(CONFIG, [f"model.contrast={none}"]).model.contrast is None


def test_one_key_contrasts_across_processes() -> None:
    cfg = load_config(CONFIG, ["model.contrast.across_processes=True"])
    contrast = instantiate(cfg.model).contrast
    assert contrast.across_processes and contrast.sampler.across_processes


def test_arguments_that_the_config_leaves_at_their_default_can_be_set() -> None:
    cfg = load_config(CONFIG, ["model.contrast.symmetric=True", "model.backbone.norm_outputs=True"])
    assert cfg.model.contrast.symmetric is True
    assert cfg.model.backbone.norm_outputs is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.contrst.temperature=0.2", "Did you mean model.contrast.temperature"),
        ("train.max_iters=3", "Did you mean train.max_iter"),
        ("model.contrast.temprature=0.2", "Did you mean model.contrast.temperature"),
        ("model.backbone.drop_path=0.1", "Did you mean model.backbone.drop_path_rate"),
        ("optimizer.lr.x=1", "optimizer.lr is the value"),
        ("model.contrast.cross_scale.7.2=1", "is a list of 2"),
        ("train.max_iter", "cannot read the override|not of the form"),
        ("--resume", "flags go before"),
        ("~train.seed", "not of the form"),
        ("train.seed=1,2", "not of the form"),
        ("train.output_dir=a:b(", "cannot read the override"),
    ],
)
def test_a_wrong_override_is_told(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(CONFIG, [override])


def test_a_key_under_none_is_told() -> None:
    with pytest.raises(ValueError, match="model.contrast is None"):
        load_config(CONFIG, ["model.contrast=None", "model.contrast.temperature=0.2"])


@pytest.mark.parametrize("path", ["", "configs/no_such_file.py"])
def test_a_missing_config_file_is_told(path: str) -> None:
    with pytest.raises(ValueError, match="--config-file"):
        load_config(path)


def test_the_saved_yaml_loads_as_the_same_config(tmp_path: Path) -> None:
    cfg = load_config(CONFIG, ["train.max_iter=9"])
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    loaded = load_config(str(tmp_path / "config.yaml"), ["train.seed=4"])
    assert loaded.train.max_iter == 9
    assert loaded.train.seed == 4
    assert loaded.model.contrast.scale_weights == cfg.model.contrast.scale_weights
