"""yaml files stand for the same experiments as LazyConfig files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_backbone, build_model
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig
from torch import nn

from contrast_d2.engine import load_config
from contrast_d2.engine.config import load_yacs
from contrast_d2.yacs import add_contrast_config

ROOT = Path(__file__).parents[2]
CAMVID = ROOT / "configs/camvid"
FILES = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "ablations"
)
PAIRS = [path for path in FILES if path.with_suffix(".py").exists()]
MS_CS = str(CAMVID / "semfpn_r18_ms_cs_6k.yaml")
OFFLINE = ["MODEL.TIMM.PRETRAINED", "False"]


def plain(node: Any, prefix: str = "") -> dict[str, Any]:
    """All values of a config by dotted key: interpolations resolved, arguments that are left out at
    their defaults, and what a function computes from others computed."""
    if isinstance(node, DictConfig) and "_target_" in node:
        target = node["_target_"]
        target = locate(target) if isinstance(target, str) else target
        if inspect.isfunction(target) and target.__name__ in ("feature_shapes", "feature_channels"):
            return plain_values(instantiate(node), prefix)
        if target is dict:
            return plain_values(instantiate(node), prefix)
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(target).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        rows = {f"{prefix}_target_": target}
        items = {**defaults, **{k: v for k, v in node.items() if k != "_target_"}}
        for key, value in items.items():
            rows.update(plain(value, f"{prefix}{key}."))
        return rows
    if isinstance(node, DictConfig):
        rows = {}
        for key, value in node.items():
            rows.update(plain(value, f"{prefix}{key}."))
        return rows
    return plain_values(node, prefix)


def plain_values(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, dict):
        rows = {}
        for key, inner in value.items():
            rows.update(plain_values(inner, f"{prefix}{key}."))
        return rows
    if isinstance(value, (ListConfig, tuple, list)) and not isinstance(value, ShapeSpec):
        value = [list(v) if isinstance(v, (ListConfig, tuple)) else v for v in value]
    return {prefix.removesuffix("."): value}


def config(*overrides: str, path: str = MS_CS) -> CfgNode:
    return load_yacs(path, overrides)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def seeded(build) -> nn.Module:
    torch.manual_seed(3)
    return build()


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_a_yaml_file_is_the_experiment_of_its_python_file(path: Path) -> None:
    python = load_config(str(path.with_suffix(".py")), ["model.backbone.pretrained=False"])
    bridged = load_config(str(path), OFFLINE)
    expected, found = plain(python), plain(bridged)
    assert len(expected) > 100
    assert found == expected
    models = [seeded(lambda cfg=cfg: instantiate(cfg.model)) for cfg in (python, bridged)]
    assert_same_weights(*models)


def test_examples_have_both_kinds() -> None:
    assert {path.stem for path in FILES} - {path.stem for path in PAIRS} == {
        "semfpn_r50fpn_ms_cs_6k"
    }
    assert len(PAIRS) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_and_commands(path: Path) -> None:
    name = path.relative_to(ROOT)
    assert f"# python train_net.py --config-file {name}\n" in path.read_text()
    cfg = load_yacs(str(path))
    assert cfg.OUTPUT_DIR == f"output/{path.parent.name}/{path.stem}"


def test_detectron2_builds_the_same_model() -> None:
    cfg = config(*OFFLINE, "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()")
    tree = load_config(MS_CS, OFFLINE)
    assert_same_weights(seeded(lambda: build_model(cfg)), seeded(lambda: instantiate(tree.model)))


def test_detectron2_builds_the_parts() -> None:
    cfg = config(*OFFLINE, "MODEL.SEM_SEG_HEAD.SEMSEGFPN.FPN_CHANNELS", "24")
    model = instantiate(load_config(MS_CS, OFFLINE).model)
    backbone = seeded(lambda: build_backbone(cfg))
    shapes = backbone.output_shape()
    assert shapes == model.backbone.output_shape()
    for name, widths in (("SemSegFPNDecoder", 24), ("FCNDecoder", 64 + 128 + 256 + 512)):
        # By the name in the registry, whatever the config's is.
        head = SEM_SEG_HEADS_REGISTRY.get(name)(cfg, shapes)
        assert type(head).__name__ == name
        assert head(backbone(torch.zeros(1, 3, 64, 64))).logits.shape == (1, 11, 16, 16)
        assert widths in {conv.out_channels for conv in head.modules() if hasattr(conv, "groups")}


def test_detectron2s_own_pyramid_trains(batch) -> None:
    path = str(CAMVID / "semfpn_r50fpn_ms_cs_6k.yaml")
    cfg = load_config(
        path, ["MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "16"]
    )
    assert cfg.train.init_checkpoint.endswith("R-50.pkl") and cfg.train.allow_pickle
    assert cfg.dataloader.train.mapper.image_format == "BGR"
    assert cfg.dataloader.test.mapper.image_format == "BGR"
    model = instantiate(cfg.model).train()
    assert model.backbone.bottom_up.stem.conv1.out_channels == 32
    assert {p.requires_grad for p in model.parameters()} == {True}  # FREEZE_AT: 0 has arrived
    losses = model(batch)
    terms = ["p2", "p3", "p4", "p5", "p2_p5", "p2_p4"]
    assert set(losses) == {"loss_sem_seg", *(f"loss_contrast_{term}" for term in terms)}
    sum(losses.values()).backward()
    assert model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


def test_a_sum_of_methods() -> None:
    overrides = [
        *("MODEL.CONTRAST.NAME", "ContrastSum"),
        *("MODEL.CONTRAST.CONTRASTSUM.METHODS", "{'ms_cs': 'MultiScaleContrast', 'pne': 'PNE'}"),
        *("MODEL.CONTRAST.CONTRASTSUM.WEIGHTS", "{'pne': 0.5}"),
        *("MODEL.CONTRAST.PNE.FEATURE", "pre_logits"),
    ]
    with torch.device("meta"):
        model = instantiate(load_config(MS_CS, [*OFFLINE, *overrides]).model)
    assert model.contrast.weights == {"ms_cs": 1.0, "pne": 0.5}
    heads = {name: list(m.projector.heads) for name, m in model.contrast.methods.items()}
    assert heads == {"ms_cs": ["res2", "res3", "res4", "res5"], "pne": ["pre_logits"]}
    assert model.contrast.methods["pne"].max_hard == 199 / 8192  # the argument's own default


def test_losses_by_name() -> None:
    overrides = [
        *("MODEL.SEG_LOSS.MAIN", "LossSum"),
        *("MODEL.SEG_LOSS.AUX", "CrossEntropyLoss"),
        *("MODEL.SEG_LOSS.LOSSSUM.LOSSES", "{'ce': 'OhemCrossEntropyLoss', 'rmi': 'RMILoss'}"),
        *("MODEL.SEG_LOSS.OHEMCROSSENTROPY.THRESHOLD", "0.6"),
        *("MODEL.SEG_LOSS.CROSSENTROPY.CLASS_WEIGHTS", str([1.0] * 11)),
        *("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "77"),
    ]
    loss = instantiate(load_config(MS_CS, [*OFFLINE, *overrides]).model).seg_loss
    assert {name: type(x).__name__ for name, x in loss.main.losses.items()} == {
        "ce": "OhemCrossEntropyLoss",
        "rmi": "RMILoss",
    }
    assert loss.main.losses["ce"].threshold == 0.6
    assert len(loss.aux.weight) == 11
    assert {x.ignore_label for x in (loss.aux, *loss.main.losses.values())} == {77}


def test_solver_and_inference() -> None:
    overrides = [
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.WEIGHT_DECAY_NORM", "0.0"),
        *("SOLVER.BASE_LR", "1e-3", "SOLVER.BIAS_LR_FACTOR", "2.0"),
        *("SOLVER.OVERRIDES", "{'table': {'weight_decay': 0.125}}"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.5", "SOLVER.AMP.ENABLED", "True"),
        *("TEST.INFERENCE.SCALES", "(0.5, 1.0)", "TEST.INFERENCE.WINDOW", "64"),
        *("DATASETS.TRAIN", "('camvid_sem_seg_train', 'camvid_sem_seg_val')", "SEED", "-1"),
        *("INPUT.RANDOM_FLIP", "none", "INPUT.AUGMENTATIONS.JITTER", "False"),
    ]
    cfg = load_config(MS_CS, [*OFFLINE, *overrides])
    assert (cfg.train.clip_norm, cfg.train.precision, cfg.train.seed) == (0.5, "fp16", 0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.register_parameter("table", nn.Parameter(torch.zeros(3)))
    cfg.optimizer.params.model = model
    groups = instantiate(cfg.optimizer).param_groups
    rates = sorted((g["lr"], g["weight_decay"]) for g in groups)
    assert rates == [(1e-3, 0.0), (1e-3, 5e-4), (1e-3, 0.125), (2e-3, 0.0), (2e-3, 5e-4)]
    protocol = instantiate(cfg.dataloader.inference)
    assert (list(protocol.scales), protocol.window) == ([0.5, 1.0], 64)
    assert list(protocol.pad_value) == [123.675, 116.28, 103.53]
    assert list(cfg.dataset.train) == ["camvid_sem_seg_train", "camvid_sem_seg_val"]
    assert cfg.dataloader.train.mapper.dataset_name == "camvid_sem_seg_train"
    augmentations = instantiate(cfg.dataloader.train.mapper.augmentations)
    assert [type(a).__name__ for a in augmentations][-1] == "RandomFlip"
    assert augmentations[-1].prob == 0


def test_the_seed_reaches_the_data() -> None:
    cfg = load_config(MS_CS, [*OFFLINE, "SEED", "7", "SOLVER.ACCUMULATION_STEPS", "2"])
    assert (cfg.train.seed, cfg.dataloader.train.seed) == (7, 7)
    assert cfg.train.accumulation_steps == cfg.dataloader.train.accumulation_steps == 2


def test_the_head_learns_faster() -> None:
    cfg = load_config(MS_CS, [*OFFLINE, "SOLVER.HEAD_LR_FACTOR", "10.0"])
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 1), "sem_seg_head": nn.Conv2d(4, 2, 1)})
    cfg.optimizer.params.model = model
    groups = instantiate(cfg.optimizer).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model["backbone"].weight)] == pytest.approx(0.02)
    assert rates[id(model["sem_seg_head"].bias)] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (
            ("LR_SCHEDULER_NAME", "WarmupMultiStepLR", "STEPS", "(3000, 4500)", "GAMMA", "0.5"),
            {0: 1.0, 0.4: 1.0, 0.6: 0.5, 0.8: 0.25},
        ),
        (("LR_SCHEDULER_NAME", "WarmupCosineLR"), {0: 1.0, 0.5: 0.5}),
        (("POLY_LR_POWER", "2.0"), {0: 1.0, 0.5: 0.25}),
        (("POLY_LR_POWER", "2.0", "WARMUP_ITERS", "600"), {0: 1e-3, 0.5: 0.25}),
        (("LR_SCHEDULER_NAME", "WarmupCosineLR", "WARMUP_ITERS", "600"), {0: 1e-3, 0.5: 0.5}),
    ],
)
def test_schedules(overrides: tuple[str, ...], values: dict[float, float]) -> None:
    keys = [f"SOLVER.{text}" if i % 2 == 0 else text for i, text in enumerate(overrides)]
    multiplier = instantiate(load_config(MS_CS, [*OFFLINE, *keys]).lr_multiplier)
    assert {t: multiplier(t) for t in values} == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.MASK_ON", "True", "MODEL.MASK_ON=True: not read"),
        ("SOLVER.STEPS", "(1000,)", r"SOLVER.STEPS=\[1000\].*WarmupMultiStepLR"),
        ("SOLVER.BETAS", "(0.8, 0.9)", "SOLVER.BETAS"),
        ("SOLVER.WARMUP_METHOD", "constant", "SOLVER.WARMUP_METHOD='constant'"),
        ("INPUT.MIN_SIZE_TRAIN", "(512, 640)", "INPUT.AUGMENTATIONS.SCALE"),
        ("TEST.AUG.ENABLED", "True", "TEST.INFERENCE.SCALES"),
        ("MODEL.BACKBONE.FREEZE_AT", "4", "MODEL.TIMM.FREEZE_AT"),
        ("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.DEPTH=18"),
        ("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", "0.5", "MODEL.SEG_LOSS"),
        ("MODEL.PANOPTIC_FPN.COMBINE.ENABLED", "False", "COMBINE.ENABLED=False"),
        ("MODEL.DEVICE", "cuda:1", "CUDA_VISIBLE_DEVICES"),
        ("DATALOADER.ASPECT_RATIO_GROUPING", "False", None),
        ("MODEL.CONTRAST.NAME", "''", None),  # its section may stay
        ("MODEL.CONTRAST.PNE.WEIGHT", "2.0", None),
        ("SOLVER.AMP.PRECISION", "bf16", None),  # while it is not ENABLED
        ("SOLVER.LR_SCHEDULER_NAME", "Step", "choose 'WarmupPolyLR'"),
        ("SOLVER.OPTIMIZER", "Adagrad", "choose 'SGD', 'Adam' or 'AdamW'"),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "full_model"),
        ("INPUT.CROP.TYPE", "relative", "TYPE absolute"),
        ("INPUT.CROP.ENABLED", "False", "training needs crops"),
        ("INPUT.RANDOM_FLIP", "vertical", "'horizontal' or 'none'"),
        ("DATASETS.TRAIN", "()", "DATASETS.TRAIN is empty"),
        ("DATASETS.TEST", "('a', 'b')", "name one dataset"),
        ("MODEL.META_ARCHITECTURE", "SemanticSegmentor", "set ContrastiveSegmentor"),
        ("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "returns a tuple: choose a decoder"),
        ("MODEL.SEM_SEG_HEAD.NAME", "FCNDecodr", "Did you mean 'FCNDecoder'"),
        ("MODEL.SEM_SEG_HEAD.IN_FEATURES", "('p2',)", "TimmBackbone has the maps"),
        ("MODEL.BACKBONE.NAME", "TimBackbone", "Did you mean 'TimmBackbone'.*--import"),
        ("MODEL.TIMM.NAME", "None", "MODEL.TIMM.NAME is not set"),
        ("MODEL.TIMM.NAME", "resnet19", "timm .* has no model 'resnet19'"),
        ("MODEL.CONTRAST.NAME", "Multiscale", "Did you mean 'MultiScaleContrast'"),
        ("MODEL.CONTRAST.NAME", "PixelContrast", "MODEL.CONTRAST.PIXEL.FEATURE is not set"),
        ("MODEL.SEG_LOSS.MAIN", "CELoss", "SEG_LOSS registry"),
    ],
)
def test_what_has_no_effect_or_is_not_there_is_told(
    key: str, value: str, message: str | None
) -> None:
    overrides = [*OFFLINE, key, value]
    if message is None:
        load_config(MS_CS, overrides)
        return
    with pytest.raises(ValueError, match=message):
        load_config(MS_CS, overrides)


def test_keys_are_added_once() -> None:
    cfg = get_cfg()
    add_contrast_config(cfg)
    with pytest.raises(ValueError, match="add the keys to a config once"):
        add_contrast_config(cfg)


OWN = [
    *("MODEL.BACKBONE.NAME", "build_two_stages", "MODEL.TWO_STAGES.WIDTH", "6"),
    *("MODEL.SEM_SEG_HEAD.IN_FEATURES", "('fine', 'coarse')"),
    *("MODEL.CONTRAST.MULTISCALE.SCALE_WEIGHTS", "{'fine': 1.0, 'coarse': 0.5}"),
    *("MODEL.CONTRAST.MULTISCALE.CROSS_SCALE", "(('fine', 'coarse', 1.0),)"),
]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.usefixtures("own_parts")
def test_a_backbone_of_ones_own(batch, exact: bool) -> None:
    path = str(CAMVID / "semfpn_r18_base_6k.yaml")
    overrides = [*OWN, "MODEL.CONTRAST.NAME", "MultiScaleContrast"]
    if exact:
        overrides += ["MODEL.TWO_STAGES.EXACT", "True"]
    random = torch.random.get_rng_state()
    cfg = load_config(path, overrides)
    assert torch.equal(torch.random.get_rng_state(), random)
    settings = {"WIDTH": 6, "EXACT": True} if exact else {"WIDTH": 6}
    assert cfg.model.backbone.settings == {"MODEL": {"TWO_STAGES": settings}}
    assert cfg.model.contrast.projector.in_channels == {"fine": 6, "coarse": 12}
    model = instantiate(cfg.model)
    assert model.sem_seg_head.fpn.fpn_lateral3.in_channels == 12
    losses = model.train()(batch)
    assert set(losses) == {
        "loss_sem_seg",
        *(f"loss_contrast_{term}" for term in ("fine", "coarse", "fine_coarse")),
    }


@pytest.mark.usefixtures("own_parts")
def test_a_decoder_of_ones_own() -> None:
    overrides = [*OWN, "MODEL.SEM_SEG_HEAD.NAME", "build_one_map", "MODEL.SEM_SEG_HEAD.DEPTH", "3"]
    overrides += ["MODEL.CONTRAST.NAME", "PNE", "MODEL.CONTRAST.PNE.FEATURE", "pre_logits"]
    cfg = load_config(str(CAMVID / "semfpn_r18_base_6k.yaml"), overrides)
    head = instantiate(cfg.model).sem_seg_head
    assert (len(head.convs), head.predictor.out_channels) == (3, 11)
    assert cfg.model.contrast.projector.in_channels == {"pre_logits": 6}


@pytest.mark.usefixtures("own_parts")
def test_a_key_that_ones_own_builder_does_not_read_is_told() -> None:
    with pytest.raises(ValueError, match="MODEL.TWO_STAGES.UNUSED=3: not read"):
        load_config(str(CAMVID / "semfpn_r18_base_6k.yaml"), [*OWN, "MODEL.TWO_STAGES.UNUSED", "3"])
