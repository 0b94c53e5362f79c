"""yaml configs: the experiments that they stand for, and detectron2's own trainer on one."""

from __future__ import annotations

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, configurable, get_cfg, instantiate
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import SemSegEvaluator
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.solver import build_optimizer
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from contrast_d2 import add_contrast_config
from contrast_d2.backbones import without_starting_weights
from contrast_d2.config.yacs import ReadKeys, load_yacs, tree_from_yacs
from contrast_d2.evaluation.runs import load_saved_config

ROOT = Path(__file__).parents[2]
CAMVID = ROOT / "configs/camvid"
FILES = [p for p in sorted((ROOT / "configs").glob("*/*.yaml")) if p.parent.name != "ablations"]
PAIRS = [path for path in FILES if path.with_suffix(".py").exists()]
MS_CS = str(CAMVID / "semfpn_r18_ms_cs_6k.yaml")
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
        ours, theirs = (OmegaConf.to_container(cfg, resolve=True)[key] for cfg in (bridged, python))
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


def test_names() -> None:
    for path in FILES:
        assert load_yacs(str(path)).OUTPUT_DIR == f"output/{path.parent.name}/{path.stem}"
        command = f"# python train_net.py --config-file {path.relative_to(ROOT)}\n"
        assert command in path.read_text()
    assert len(PAIRS) == len(FILES) - 1


def test_detectron2s_own_backbone_and_head() -> None:
    cfg = load_yacs(str(CAMVID / "semfpn_r50fpn_ms_cs_6k.yaml"), ["MODEL.FPN.OUT_CHANNELS", "16"])
    tree = tree_from_yacs(cfg)
    assert tree.train.init_checkpoint.endswith("R-50.pkl") and tree.train.allow_pickle
    assert {tree.dataloader[name].mapper.image_format for name in ("train", "test")} == {"BGR"}
    model = instantiate(tree.model).train()
    assert type(model.sem_seg_head) is SemSegFPNHead
    losses = model(batch())
    terms = ["p2", "p3", "p4", "p5", "p2_p5", "p2_p4"]
    assert set(losses) == {"loss_sem_seg", *(f"loss_contrast_{term}" for term in terms)}


def test_the_baseline_of_a_saved_config_without_a_download(tmp_path: Path) -> None:
    cfg = saved(tree_from_yacs(load_yacs(MS_CS)), tmp_path / "config.yaml")
    assert cfg.model.contrast == "ms_cs" and cfg.model.cfg.MODEL.BACKBONE.OPTIONS.PRETRAINED
    cfg.model.contrast = None
    model = without_starting_weights(cfg.model)
    assert not model.cfg.MODEL.BACKBONE.OPTIONS.PRETRAINED
    assert instantiate(model).contrast is None


def test_keys_of_detectron2_mean_what_they_mean_there() -> None:
    overrides = [
        *("SOLVER.BIAS_LR_FACTOR", "2.0", "SOLVER.WEIGHT_DECAY_NORM", "0.0", "SEED", "7"),
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(3000, 4500)"),
        *("SOLVER.AMP.ENABLED", "True", "SOLVER.CHECKPOINT_PERIOD", "9", "MODEL.DEVICE", "cpu"),
        *("DATASETS.TRAIN", "('camvid_sem_seg_train', 'camvid_sem_seg_val')"),
        *("INPUT.RANDOM_FLIP", "none", "INPUT.FORMAT", "BGR", "TRAIN.EMA_DECAY", "0.9"),
        *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        *("DATALOADER.REPEAT_THRESHOLD", "0.25", "TEST.INFERENCE.SCALES", "(0.5, 1.0)"),
        *("INPUT.AUGMENTATIONS.CLASS_CROP", "0.5", "TEST.EVALUATOR.SAVE_PREDICTIONS", "True"),
    ]
    cfg = load_yacs(MS_CS, [*OFFLINE, *overrides])
    tree = tree_from_yacs(cfg)
    train, loader = tree.train, tree.dataloader.train
    assert train.amp == {"enabled": True, "dtype": "fp16"} and train.checkpointer.period == 9
    assert (train.device, train.seed, train.ema_decay, loader.seed) == ("cpu", 7, 0.9, 7)
    assert loader.dataset == ["camvid_sem_seg_train", "camvid_sem_seg_val"]
    assert (loader.mapper.dataset_name, loader.repeat_threshold) == ("camvid_sem_seg_train", 0.25)
    augmentations = loader.mapper.augmentations
    assert (augmentations.flip, augmentations.class_crop) == (0, 0.5)
    assert list(tree.dataloader.inference.scales) == [0.5, 1.0]
    assert tree.dataloader.evaluator.save_predictions

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    theirs = [(g["lr"], g["weight_decay"]) for g in build_optimizer(cfg, model).param_groups]
    assert [(g["lr"], g["weight_decay"]) for g in groups(tree, model)] == theirs
    tree.train.max_iter = 1000  # of which 3000 and 4500 are too many
    multiplier = instantiate(tree.lr_multiplier)
    assert multiplier(0.9) == 1
    tree.train.max_iter = 6000
    multiplier = instantiate(tree.lr_multiplier)
    assert [multiplier(t) for t in (0.4, 0.6, 0.8)] == pytest.approx([1, 0.1, 0.01])


def test_what_has_no_effect_or_is_not_there(subtests: pytest.Subtests) -> None:
    for key, value, message in [
        ("MODEL.MASK_ON", "True", "MODEL.MASK_ON=True"),
        ("SOLVER.STEPS", "(1000,)", r"SOLVER.STEPS=\[1000\]"),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "CLIP_GRADIENTS.ENABLED=True"),
        ("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.DEPTH=18"),
        ("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", "0.5", "LOSS_WEIGHT=0.5"),
        ("MODEL.CONTRAST.NAME", "", None),  # its options may stay
        ("DATALOADER.ASPECT_RATIO_GROUPING", "False", None),
        ("MODEL.META_ARCHITECTURE", "SemanticSegmentor", "CONTRAST.NAME='ms_cs'.*"),
        ("SOLVER.LR_SCHEDULER_NAME", "Step", "Step"),
        ("INPUT.CROP.ENABLED", "False", "INPUT.CROP.ENABLED"),
        ("INPUT.RANDOM_FLIP", "vertical", "'horizontal' or 'none'"),
        ("DATASETS.TRAIN", "()", "DATASETS.TRAIN"),
        ("DATASETS.TEST", "('a', 'b')", "DATASETS.TEST"),
        ("MODEL.SEM_SEG_HEAD.NAME", "FCNDecodr", "FCNDecoder"),
        ("MODEL.SEM_SEG_HEAD.OPTIONS.WIDTH", "3", r"SEM_SEG_HEAD.OPTIONS.WIDTH\b"),
        ("MODEL.BACKBONE.NAME", "TimBackbone", "TimmBackbone.*--import"),
        ("MODEL.BACKBONE.OPTIONS", "{}", "MODEL.BACKBONE.OPTIONS.NAME"),
        ("MODEL.CONTRAST.OPTIONS.WEIHGT", "1.0", "MODEL.CONTRAST.OPTIONS.WEIGHT"),
        ("MODEL.SEG_LOSS.NAME", "CELoss", "SEG_LOSS registry"),
        ("TRAIN.MAX_ITER", "3", "TRAIN.MAX_ITER"),
        ("SOLVER.MAX_ITR", "3", r"SOLVER.MAX_ITR\b.*SOLVER.MAX_ITER\b"),
        ("SEED.X", "3", r"SEED.X\b"),
    ]:
        with subtests.test(key=key, value=value):
            if message is None:
                tree_of(MS_CS, key, value)
                return
            with pytest.raises(ValueError, match=message):
                tree_of(MS_CS, key, value)


class Part:
    @configurable
    def __init__(self, width: int) -> None:
        self.width = width

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {"width": cfg.A.WIDTH}


A = {"A.WIDTH", "A.DEPTH"}


def test_keys_that_are_read_are_noted(subtests: pytest.Subtests) -> None:
    for read, expected in [
        (lambda cfg: cfg.A, set()),  # a section by itself says nothing yet
        (lambda cfg: cfg.A.WIDTH, {"A.WIDTH"}),
        (lambda cfg: cfg["A"]["DEPTH"], {"A.DEPTH"}),
        (lambda cfg: cfg.get("SEED"), {"SEED"}),
        (lambda cfg: cfg.get("NONE", 3), set()),
        (lambda cfg: "WIDTH" in cfg.A, set()),
        (lambda cfg: dict(**cfg.A), A),
        (lambda cfg: dict(cfg.A), A),
        (lambda cfg: list(cfg.A.items()), A),
        (lambda cfg: list(cfg.A.values()), A),
        (lambda cfg: {key.lower(): cfg.A[key] for key in cfg.A}, A),
        (lambda cfg: cfg.A.clone(), A),
        (lambda cfg: Part(cfg).width, {"A.WIDTH"}),
    ]:
        with subtests.test(read=read):
            cfg = CfgNode({"A": {"WIDTH": 3, "DEPTH": 2}, "SEED": 1})
            keys = ReadKeys(cfg, set())
            assert read(keys) == read(cfg)
            assert keys.read == expected


MODULE = """
from detectron2.modeling import BACKBONE_REGISTRY
from contrast_d2.backbones import TimmBackbone


@BACKBONE_REGISTRY.register()
def build_mine(cfg, input_shape):
    options = cfg.MODEL.BACKBONE.OPTIONS
    backbone = TimmBackbone(options.MODEL)
    if options.EXACT:  # as builders that look at values do; impossible without memory
        assert float(backbone.model.conv1[0].weight.detach().abs().sum()) > 0
    return backbone
"""
YAML = """
MODEL:
  META_ARCHITECTURE: ContrastiveSegmentor
  BACKBONE: {NAME: build_mine, OPTIONS: {MODEL: test_resnet, EXACT: True}}
  SEM_SEG_HEAD: {NAME: FCNDecoder, NORM: BN, IN_FEATURES: [res2, res3], NUM_CLASSES: 9}
  CONTRAST: {NAME: pixel, OPTIONS: {FEATURE: concat, WARMUP_ITERS: 0, EMBED_DIM: 8}}
DATASETS: {TRAIN: [shapes_sem_seg_val], TEST: [shapes_sem_seg_val]}
DATALOADER: {NUM_WORKERS: 1}
INPUT: {CROP: {ENABLED: True, TYPE: absolute, SIZE: [64, 64]}}
SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 4, LR_SCHEDULER_NAME: WarmupCosineLR, CHECKPOINT_PERIOD: 2}
TRAIN: {LOG_PERIOD: 1}
OUTPUT_DIR: out
"""


@pytest.mark.slow
def test_the_command_with_a_backbone_of_ones_own(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = subprocess.run(
            [sys.executable, str(ROOT / "train_net.py"), *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        return result.returncode, result.stdout + result.stderr

    (tmp_path / "my_parts.py").write_text(MODULE)
    (tmp_path / "my.yaml").write_text(YAML)
    flags = ["--config-file", "my.yaml", "--import", "my_parts.py"]
    code, text = run(*flags, "SOLVER.MAX_ITER", "2")
    assert code == 0, text[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert "loss_contrast_concat" in rows[0]
    code, text = run(*flags, "--resume", "TEST.EVAL_PERIOD", "4")
    assert code == 0 and "Starting training from iteration 2" in text, text[-3000:]
    scores = tmp_path / "out/inference/shapes_sem_seg_val/sem_seg_evaluation.json"
    before = scores.read_text()
    scores.unlink()
    saved = ["--config-file", "out/config.yaml", "--eval-only"]
    code, text = run(*saved, "--import", "my_parts", "dataloader.test.num_workers=0")
    assert code == 0 and json.loads(scores.read_text()) == json.loads(before), text[-3000:]
    for arguments, message in (
        (saved, "error: 'build_mine' is not in the BACKBONE registry"),
        (
            [*flags, "MODEL.BACKBONE.OPTIONS.UNUSED", "3"],
            "error: MODEL.BACKBONE.OPTIONS.UNUSED=3: ",
        ),
    ):
        code, text = run(*arguments)
        assert code == 1 and message in text and "Traceback" not in text


class WithEvaluator(DefaultTrainer):
    """detectron2's trainer, which leaves it to its users what they evaluate with."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> SemSegEvaluator:
        return SemSegEvaluator(dataset_name)


class WithOurLoader(WithEvaluator):
    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return instantiate(tree_from_yacs(cfg).dataloader.train)


@pytest.mark.parametrize("trainer", [WithEvaluator, WithOurLoader])
def test_detectron2s_own_trainer(trainer: type[DefaultTrainer], tmp_path: Path) -> None:
    cfg = get_cfg()
    add_contrast_config(cfg)
    cfg.merge_from_file(MS_CS)
    changes = [
        *("DATASETS.TRAIN", ("shapes_sem_seg_train",), "DATASETS.TEST", ("shapes_sem_seg_val",)),
        *("MODEL.BACKBONE.OPTIONS.NAME", "test_resnet", "MODEL.BACKBONE.OPTIONS.PRETRAINED", False),
        *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "INPUT.CROP.SIZE", (96, 128)),
        *(
            "SOLVER.LR_SCHEDULER_NAME",
            "WarmupCosineLR",
            "TEST.EVAL_PERIOD",
            2,
            "INPUT.MIN_SIZE_TEST",
            0,
        ),
        *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path)),
    ]
    if trainer is WithEvaluator:  # ours scales images by factors
        changes += ["INPUT.MIN_SIZE_TRAIN", (96,)]
    cfg.merge_from_list(changes)
    cfg.MODEL.SEM_SEG_HEAD.OPTIONS.FPN_CHANNELS = 8
    run = trainer(cfg)
    before = copy.deepcopy(run.model.state_dict())
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    metrics = {name: value for row in rows for name, value in row.items()}
    assert metrics["loss_contrast_res2"] > 0 and metrics["sem_seg/mIoU"] > 0
    moved = {n for n, value in run.model.state_dict().items() if not torch.equal(value, before[n])}
    weights = {name for name, _ in run.model.named_parameters()}
    assert moved >= {name for name in weights if name.startswith("contrast.projector.heads.res2")}
