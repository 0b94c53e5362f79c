"""Every experiment file: what it builds, and what it states."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from contrast_d2.contrast import ContrastMethod, ContrastSum, MultiScaleContrast

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs").rglob("*.py")
    if path.parts[len(ROOT.parts) + 1] != "common"
)
METHODS = [path for path in FILES if "_base_" not in path.name]
# One for each pair of backbone and decoder.
ARCHITECTURES = [
    "configs/camvid/semfpn_r18_ms_cs_6k.py",
    "configs/camvid/fcn_hrnet18_ms_cs_6k.py",
    "configs/camvid/semfpn_swin_tiny_ms_cs_6k.py",
    "configs/cityscapes/fcn_hrnet48_ms_cs_40k.py",
]
# Terms of each other method's loss.
TERMS = {
    "contextrast": ["res2", "res3", "res4", "res5"],
    "ms_cs_boundary": ["res2", "res3", "res4", "res5", "res2_res5", "res2_res4"],
    "ms_cs_contextrast": [
        *("ms_cs_res2", "ms_cs_res3", "ms_cs_res4", "ms_cs_res5"),
        *("ms_cs_res2_res5", "ms_cs_res2_res4"),
        *("contextrast_res2", "contextrast_res3", "contextrast_res4", "contextrast_res5"),
    ],
    "pixel": ["p2"],
    "pixel_boundary": ["p2"],
    "pixel_memory": ["p2"],
    "pixel_memory_semi_hard": ["p2"],
    "pixel_release": ["p2"],
    "pne": ["pre_logits"],
}


def load(path: Path | str, *overrides: str) -> DictConfig:
    """An experiment file, without pretrained weights and with data loaded in this process."""
    cfg = LazyConfig.load(str(ROOT / path))
    cfg.model.backbone.pretrained = False
    cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    return LazyConfig.apply_overrides(cfg, list(overrides))


def meta_model(cfg: DictConfig) -> nn.Module:
    """The model's shapes, without memory for its weights."""
    with torch.device("meta"):
        return instantiate(cfg.model)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """All values of a config by dotted key, interpolations as they are written."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, dict) and node:
        rows = (flat(value, f"{prefix}.{key}" if prefix else key) for key, value in node.items())
        return dict(itertools.chain.from_iterable(row.items() for row in rows))
    return {prefix: node}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_name_docstring_and_keys(path: Path) -> None:
    cfg = load(path)
    keys = {"train", "model", "dataset", "dataloader", "optimizer", "lr_multiplier"}
    assert {key for key in cfg if not key.startswith("_")} == keys
    assert cfg.train.output_dir == f"output/{path.parent.name}/{path.stem}"
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    assert f"python train_net.py --config-file {path}" in docstring


@pytest.mark.parametrize("path", FILES, ids=str)
def test_instantiates_on_the_cpu(path: Path) -> None:
    cfg = load(path)
    model = instantiate(cfg.model)
    parameters = dict(model.named_parameters())
    assert {p.device.type for p in parameters.values()} == {"cpu"}
    assert (model.contrast is not None) == (path in METHODS)

    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in parameters.values()}
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.optimizer.lr}

    schedule = instantiate(cfg.lr_multiplier)
    last = (cfg.train.max_iter - 1) / cfg.train.max_iter
    power = cfg.lr_multiplier.power
    assert schedule(last) == pytest.approx((1 / cfg.train.max_iter) ** power)
    assert schedule(0.5) == pytest.approx(0.5**power)


def test_swin_norms_are_not_decayed() -> None:
    cfg = load("configs/camvid/semfpn_swin_tiny_base_6k.py")
    model = cfg.optimizer.params.model = meta_model(cfg)
    decay = {
        id(p): group["weight_decay"]
        for group in instantiate(cfg.optimizer).param_groups
        for p in group["params"]
    }
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) > 20
    assert {decay[id(p)] for norm in norms for p in norm.parameters()} == {0.0}
    assert {decay[id(m.weight)] for m in model.modules() if isinstance(m, nn.Conv2d)} == {0.01}


def methods_of(model: nn.Module) -> list[ContrastMethod]:
    """The contrast methods of a model."""
    if isinstance(model.contrast, ContrastSum):
        return list(model.contrast.methods.values())
    return [] if model.contrast is None else [model.contrast]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_decoder_projector_and_losses_fit(path: Path) -> None:
    cfg = load(path)
    model = meta_model(cfg)
    classes, ignored = cfg.dataset.num_classes, cfg.dataset.ignore_label
    assert model.sem_seg_head.predictor.weight.shape[0] == classes
    assert model.ignore_label == model.seg_loss.main.ignore_label == ignored
    maps = model.backbone(torch.zeros(1, 3, 64, 96, device="meta"))
    maps.update(model.sem_seg_head(maps).features)
    for method in methods_of(model):
        parts = [getattr(method, name, None) for name in ("sampler", "memory", "negatives")]
        counts = [getattr(part, "num_classes", None) for part in [method, *parts]]
        assert {count for count in counts if count is not None} == {classes}
        heads = {n: head[0].weight.shape[1] for n, head in method.projector.heads.items()}
        assert heads == {name: maps[name].shape[1] for name in heads}


@pytest.mark.parametrize("path", METHODS, ids=str)
def test_method_and_baseline_differ_by_one_key(path: Path) -> None:
    method, baseline = flat(load(path)), flat(load(baseline_of(path)))
    different = {
        key
        for key in method.keys() | baseline.keys()
        if method.get(key, "absent") != baseline.get(key, "absent")
    }
    assert baseline["model.contrast"] is None
    assert {k for k in different if not k.startswith("model.contrast")} == {"train.output_dir"}
    assert any(k.startswith("model.contrast.") for k in different)


def baseline_of(path: Path) -> Path:
    """The file of the same model and schedule that is named `base` where this one has a method."""
    (baseline,) = (
        other
        for other in FILES
        if other not in METHODS
        and other.parent == path.parent
        and path.name.startswith(other.name.partition("base_")[0])
        and path.name.endswith(other.name.partition("_base")[2])
    )
    return baseline


@pytest.mark.parametrize(
    ("variant", "projection", "norm_statistics", "norm"),
    [
        ("sampled_draw", "sampled", "draw", "batch"),
        ("sampled_layer", "sampled", None, "layer"),
        ("sampled_map", "sampled", "map", "batch"),
    ],
)
def test_projections_differ_by_what_they_name(
    variant: str, projection: str, norm_statistics: str | None, norm: str
) -> None:
    dense = load("configs/camvid/semfpn_r18_ms_cs_cpu.py")
    cfg = load(f"configs/camvid/semfpn_r18_ms_cs_{variant}_cpu.py")
    contrast = meta_model(cfg).contrast
    assert (contrast.projection, contrast.norm_statistics) == (projection, norm_statistics)
    names = {"batch": "BatchNorm2d", "layer": "ChannelLayerNorm"}
    norms = [type(head[2]).__name__ for head in contrast.projector.heads.values()]
    assert norms == [names[norm]] * 4
    free = {"train.output_dir", "model.contrast.projector.norm"}
    free |= {"model.contrast.projection", "model.contrast.norm_statistics"}
    expected = {key: value for key, value in flat(dense).items() if key not in free}
    assert {key: value for key, value in flat(cfg).items() if key not in free} == expected


def trained(cfg: DictConfig) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model after a backward pass, and its losses."""
    model = instantiate(cfg.model).train()
    batch = [
        {
            "image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8),
            "sem_seg": torch.randint(0, 11, (8, 12))
            .repeat_interleave(8, 0)
            .repeat_interleave(8, 1),
        }
        for _ in range(2)
    ]
    losses = model(batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, grad in gradients.items() if grad is None]
    assert all(grad.isfinite().all() for grad in gradients.values())
    return model, losses


@pytest.mark.parametrize("path", ARCHITECTURES)
def test_forward_and_backward(path: str) -> None:
    _, losses = trained(load(path))
    terms = ["res2", "res3", "res4", "res5", "res2_res5", "res2_res4"]
    assert set(losses) == {"loss_sem_seg", *(f"loss_contrast_{term}" for term in terms)}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


@pytest.mark.parametrize("name", TERMS)
def test_forward_and_backward_of_every_method(name: str) -> None:
    cfg = load(f"configs/camvid/semfpn_r18_{name}_6k.py")
    if "warmup_iters" in cfg.model.contrast:
        cfg.model.contrast.warmup_iters = 0
    if name == "pixel_release":
        cfg.model.contrast.sampler.min_pixels = 1  # of maps of 16x24 pixels
    model, losses = trained(cfg)
    assert list(losses) == ["loss_sem_seg", *(f"loss_contrast_{term}" for term in TERMS[name])]
    # At random weights few pixels are right, and PNE may find no group.
    if name != "pne":
        assert all(loss > 0 for loss in losses.values())


def test_every_method_is_trained_above() -> None:
    names = {path.name.partition("semfpn_r18_")[2] for path in METHODS if "_6k" in path.name}
    others = {name.removesuffix("_6k.py") for name in names if name}
    assert others == {"ms_cs", "ms_cs_release", *TERMS}


def test_every_architecture_is_trained_above() -> None:
    def architecture(path: Path | str) -> tuple[str, str]:
        model = load(path).model
        return model.backbone.name, str(model.sem_seg_head["_target_"])

    assert {architecture(p) for p in FILES} == {architecture(p) for p in ARCHITECTURES}


def settings(contrast: MultiScaleContrast) -> dict[str, Any]:
    """What the presets fix, as built."""
    sampler, heads = contrast.sampler, contrast.projector.heads
    layers = next(iter(heads.values()))
    return {
        "weights": {term.name: round(term.weight, 9) for term in contrast.terms},
        "temperatures": {term.temperature for term in contrast.terms},
        "balance": sampler.balance,
        "anchors": (sampler.max_anchors, sampler.min_pixels, sampler.max_per_group),
        "floor": sampler.floor,
        "layers": [type(layer).__name__ for layer in layers],
        "bias": [layer.bias is not None for layer in layers if isinstance(layer, nn.Conv2d)],
        "width": {head[-1].weight.shape[0] for head in heads.values()},
        "momentum": {m.momentum for m in heads.modules() if isinstance(m, nn.BatchNorm2d)},
        "flags": (contrast.detach_contrast, contrast.across_processes),
        "count_empty_anchors": contrast.count_empty_anchors,
    }


SHARED = {
    "weights": {
        "res2": 0.1,
        "res3": 0.07,
        "res4": 0.04,
        "res5": 0.01,
        "res2_res5": 0.1,
        "res2_res4": 0.1,
    },
    "temperatures": {0.1},
    "width": {256},
    "flags": (False, False),
}


def test_ms_cs_is_as_in_the_paper() -> None:
    # Pissas et al., ECCV 2022, sections 3.2 to 3.4 and 4.1.
    contrast = meta_model(load("configs/camvid/semfpn_r18_ms_cs_6k.py")).contrast
    hidden = ["Conv2d", "ReLU", "BatchNorm2d"]
    assert settings(contrast) == {
        **SHARED,
        "balance": "class",
        "anchors": (10_000, 1, None),
        "floor": 32,  # ours; 0 is the paper's
        "layers": [*hidden, *hidden, "Conv2d"],
        "bias": [False, False, True],
        "momentum": {0.1},
        "count_empty_anchors": False,
    }


def test_ms_cs_release_is_as_released() -> None:
    contrast = meta_model(load("configs/camvid/semfpn_r18_ms_cs_release_6k.py")).contrast
    assert settings(contrast) == {
        **SHARED,
        "balance": "image_class",
        "anchors": (10_000, 5, 2500),
        "floor": 0,
        "layers": ["Conv2d", "ReLU", "BatchNorm2d", "Conv2d"],
        "bias": [False, True],
        "momentum": {3e-4},
        "count_empty_anchors": True,
    }


def test_pixel_contrast_is_as_in_the_paper() -> None:
    # Wang et al., ICCV 2021, sections 3.2 and 3.3.
    contrast = meta_model(load("configs/camvid/semfpn_r18_pixel_memory_semi_hard_6k.py")).contrast
    sampler, memory, pairs = contrast.sampler, contrast.memory, contrast.pairs
    assert (sampler.balance, sampler.max_per_group, sampler.min_pixels) == ("class", 50, 1)
    assert (sampler.hard_share, sampler.rest) == (0.5, "random")
    # Of CamVid's 367 training images, a region each, and ten times as many pixels.
    assert (memory.regions_per_class, memory.pixels_per_class) == (367, 3670)
    assert memory.pixels_per_image == 10
    assert (pairs.fraction, pairs.max_positives, pairs.max_negatives) == (0.1, 1024, 2048)
    assert contrast.temperature == 0.1
    assert contrast.weight == pytest.approx(0.1)  # the release's
    heads = contrast.projector.heads["p2"]
    assert [type(layer).__name__ for layer in heads] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]


def test_pixel_release_is_as_released() -> None:
    contrast = meta_model(load("configs/camvid/semfpn_r18_pixel_release_6k.py")).contrast
    sampler = contrast.sampler
    assert (sampler.balance, sampler.max_anchors, sampler.max_per_group) == (
        "image_class",
        1024,
        100,
    )
    assert (sampler.min_pixels, sampler.hard_share, sampler.rest) == (101, 0.5, "easy")
    assert contrast.weight == pytest.approx(0.1 * 0.1 / 0.07)
    assert contrast.memory is contrast.pairs is None


def test_images_are_normalised_as_timms_weights_expect() -> None:
    model = load("configs/camvid/semfpn_r18_base_6k.py").model
    weights = timm.get_pretrained_cfg(model.backbone.name)
    assert list(model.pixel_mean) == pytest.approx([255 * x for x in weights.mean])
    assert list(model.pixel_std) == pytest.approx([255 * x for x in weights.std])


def test_decoder_and_projector_follow_the_backbone() -> None:
    path = "configs/camvid/semfpn_r18_ms_cs_6k.py"
    model = meta_model(load(path, "model.backbone.name=resnet50"))
    widths = {"res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
    assert {n: s.channels for n, s in model.backbone.output_shape().items()} == widths
    lateral = {n: model.sem_seg_head.fpn.get_submodule(f"fpn_lateral{n[-1]}") for n in widths}
    assert {name: conv.in_channels for name, conv in lateral.items()} == widths
    heads = model.contrast.projector.heads
    assert {name: head[0].in_channels for name, head in heads.items()} == widths


def test_decoder_follows_the_output_stride() -> None:
    path = "configs/camvid/fcn_hrnet18_ms_cs_6k.py"
    overrides = ("model.backbone.name=resnet18", "model.backbone.output_stride=8")
    head = load(path, *overrides).model.sem_seg_head
    shapes = instantiate(head.input_shape)
    assert [shape.stride for shape in shapes.values()] == [4, 8, 8, 8]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "shapes"], ids=str)
def test_loads_shapes(path: Path) -> None:
    check_data(path)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "camvid"], ids=str)
def test_loads_camvid(path: Path, camvid: Path) -> None:
    check_data(path)


def check_data(path: Path) -> None:
    cfg = load(path, "dataloader.train.total_batch_size=2")
    crop = tuple(cfg.dataloader.train.mapper.augmentations.crop_size)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert [tuple(x["image"].shape) for x in batch] == [(3, *crop)] * 2
    assert [tuple(x["sem_seg"].shape) for x in batch] == [crop] * 2
    allowed = {*range(cfg.dataset.num_classes), cfg.dataset.ignore_label}
    assert {label for x in batch for label in x["sem_seg"].unique().tolist()} <= allowed
    [sample] = next(iter(instantiate(cfg.dataloader.test)))
    assert sample["image"].shape[1:] == (sample["height"], sample["width"])
    assert cfg.dataset.train != cfg.dataset.test
    instantiate(cfg.dataloader.evaluator).reset()
