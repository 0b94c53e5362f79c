"""Every semantic head in every segmentor: ours and detectron2's, from yaml and from LazyConfig.

Shape letters: B images, K classes, H W images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, SemanticSegmentor, build_model
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.projects.deeplab import DeepLabV3PlusHead
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2 import add_contrast_config, decoders
from contrast_d2.backbones import TimmBackbone, feature_channels, feature_shapes
from contrast_d2.decoders import FCNDecoder
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.registries import common
from contrast_d2.segmentor import ContrastiveSegmentor

NUM_CLASSES = 5
ALL = ["res2", "res3", "res4", "res5"]
NAME = "test_resnet"
SEGMENTORS = ["ContrastiveSegmentor", "SemanticSegmentor"]


class Row(NamedTuple):
    """A head: the maps that it takes, its keys in yaml, and the same as arguments.

    `keys` are those of MODEL.SEM_SEG_HEAD; keys in OPTIONS are arguments by the same name.
    """

    maps: list[str]
    keys: dict[str, Any]
    arguments: dict[str, Any] | None
    aux: bool = False


SMALL = {"OPTIONS": {"CHANNELS": 32}, "NORM": "BN"}
FPN = {"CONVS_DIM": 32, "NORM": "GN"}, {"conv_dims": 32, "norm": "GN", "common_stride": 4}
ASPP = {"CONVS_DIM": 32, "ASPP_CHANNELS": 32, "NORM": "BN", "LOSS_TYPE": "cross_entropy"}
ROWS = {
    "SemSegFPNDecoder": Row(ALL, {**FPN[0], "OPTIONS": {"FPN_CHANNELS": 16}}, FPN[1]),
    "FCNDecoder": Row(ALL, {"NORM": "BN"}, {}),
    "OCRDecoder": Row(
        ALL, {**SMALL, "OPTIONS": {"CHANNELS": 32, "KEY_CHANNELS": 16}}, {}, aux=True
    ),
    "UPerNetDecoder": Row(
        ALL, {**SMALL, "OPTIONS": {"CHANNELS": 32, "AUX_FEATURE": "res4"}}, {}, aux=True
    ),
    "DeepLabV3Decoder": Row(
        ["res4", "res5"],
        {**SMALL, "OPTIONS": {"DILATIONS": [1, 2, 3], "CHANNELS": 32, "AUX_FEATURE": "res4"}},
        {},
        aux=True,
    ),
    "DeepLabV3PlusDecoder": Row(
        ["res2", "res5"], {**SMALL, "OPTIONS": {"DILATIONS": [1, 2, 3], "CHANNELS": 32}}, {}
    ),
    "SemSegFPNHead": Row(ALL, FPN[0], FPN[1]),
    "DeepLabV3PlusHead": Row(
        ["res2", "res5"],
        {**ASPP, "COMMON_STRIDE": 4},
        {
            "project_channels": [48],
            "aspp_dilations": [6, 12, 18],
            "aspp_dropout": 0.1,
            "decoder_channels": [32, 32],
            "common_stride": 4,
            "norm": "BN",
            "train_size": [64, 96],
        },
    ),
    # detectron2 builds it of a yaml config only.
    "DeepLabV3HeadWithLayers": Row(["res5"], {**ASPP, "COMMON_STRIDE": 32}, None),
}
STOCK = {"SemSegFPNHead": SemSegFPNHead, "DeepLabV3PlusHead": DeepLabV3PlusHead}


def yaml_config(name: str, segmentor: str) -> CfgNode:
    cfg = get_cfg()
    add_contrast_config(cfg)
    head = {"NAME": name, "IN_FEATURES": ROWS[name].maps, "NUM_CLASSES": NUM_CLASSES}
    changes = {
        "MODEL": {
            "META_ARCHITECTURE": segmentor,
            "DEVICE": "cpu",
            "BACKBONE": {"NAME": "TimmBackbone", "OPTIONS": {"NAME": NAME}},
            "SEM_SEG_HEAD": {**head, **ROWS[name].keys},
            "CONTRAST": {"NAME": "ms_cs"},
        },
        "INPUT": {"CROP": {"ENABLED": True, "TYPE": "absolute", "SIZE": [64, 96]}},
    }
    cfg.merge_from_other_cfg(CfgNode(changes))
    return cfg


def from_lazy(name: str, segmentor: str) -> nn.Module:
    row = ROWS[name]
    options = {key.lower(): value for key, value in row.keys.get("OPTIONS", {}).items()}
    arguments = {"ignore_value": 255, **(row.arguments or {}), **options}
    call = L(STOCK.get(name) or getattr(decoders, name))
    model = {
        "backbone": L(TimmBackbone)(name=NAME),
        "sem_seg_head": call(
            input_shape=L(feature_shapes)(name=NAME, out_features=row.maps),
            num_classes=NUM_CLASSES,
            **arguments,
        ),
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [1.0, 1.0, 1.0],
    }
    if segmentor == "SemanticSegmentor":
        return instantiate(L(SemanticSegmentor)(**model))
    contrast = common("contrast/ms_cs", "ms_cs")
    contrast.channels = L(feature_channels)(name=NAME)
    contrast.num_classes = NUM_CLASSES
    loss = L(SegLoss)(main=L(CrossEntropyLoss)())
    return instantiate(L(ContrastiveSegmentor)(seg_loss=loss, contrast=contrast, **model))


def batch(height: int = 64, width: int = 96) -> list[dict[str, Tensor]]:
    labels = torch.randint(0, NUM_CLASSES, (2, height, width))
    labels[:, :8] = 255
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    return [{"image": image, "sem_seg": label} for image, label in zip(images, labels, strict=True)]


def test_every_head_has_a_row() -> None:
    heads = {name for name in decoders.__all__ if name != "Decoder"}
    assert ROWS.keys() == heads | STOCK.keys()
    assert all(name in SEM_SEG_HEADS_REGISTRY for name in ROWS)


@pytest.mark.parametrize("segmentor", SEGMENTORS)
@pytest.mark.parametrize("name", ROWS)
def test_trains_and_evaluates(name: str, segmentor: str) -> None:
    model = build_model(yaml_config(name, segmentor)).train()
    assert type(model).__name__ == segmentor and type(model.sem_seg_head).__name__ == name
    inputs = batch()
    torch.manual_seed(0)
    losses = model(inputs)
    contrast = [loss for key, loss in losses.items() if key.startswith("loss_contrast_")]
    assert len(contrast) == (6 if segmentor == "ContrastiveSegmentor" else 0)
    assert ("loss_aux" in losses) == ROWS[name].aux
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.sem_seg_head.named_parameters()}
    assert not [n for n, g in gradients.items() if g is None or not g.isfinite().all()]

    if ROWS[name].arguments is not None:
        lazy = from_lazy(name, segmentor).train()
        lazy.load_state_dict(model.state_dict())
        torch.manual_seed(0)
        torch.testing.assert_close(lazy(inputs), losses)

    sizes = [(61, 83), (122, 40)]
    images = [{"image": x["image"][:, :61, :83]} for x in inputs]
    images[1].update(height=122, width=40)
    results = model.eval()(images)
    assert [x["sem_seg"].shape for x in results] == [(NUM_CLASSES, *size) for size in sizes]


@pytest.mark.parametrize("align_corners", [False, True])
def test_forward_is_the_cross_entropy_of_detectron2_and_evaluation_at_full_size(
    align_corners: bool,
) -> None:
    shapes = feature_shapes(NAME)
    head = FCNDecoder(shapes, num_classes=NUM_CLASSES, ignore_value=3, align_corners=align_corners)
    maps = {
        n: torch.randn(2, s.channels, 64 // s.stride, 96 // s.stride) for n, s in shapes.items()
    }
    targets = torch.randint(0, NUM_CLASSES, (2, 64, 96))
    logits = F.interpolate(
        head.layers(maps), (64, 96), mode="bilinear", align_corners=align_corners
    )
    nothing, losses = head(maps, targets)
    assert nothing is None
    expected = F.cross_entropy(logits, targets, ignore_index=3)
    torch.testing.assert_close(losses, {"loss_sem_seg": expected})
    scores, losses = head.eval()(maps)
    assert losses == {}
    expected = F.interpolate(
        head.layers(maps), (64, 96), mode="bilinear", align_corners=align_corners
    )
    torch.testing.assert_close(scores, expected)


def test_contrast_comes_with_losses_of_its_own() -> None:
    cfg = yaml_config("SemSegFPNHead", "ContrastiveSegmentor")
    cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT = 0.0
    assert build_model(cfg)(batch())["loss_sem_seg"] > 0


def test_a_head_that_gives_no_logits_is_told_how_to() -> None:
    cfg = yaml_config("DeepLabV3HeadWithLayers", "ContrastiveSegmentor")
    cfg.MODEL.SEM_SEG_HEAD.NAME = "DeepLabV3Head"
    with pytest.raises(ValueError, match="DeepLabV3Head: .*layers.*DeepLabV3HeadWithLayers"):
        build_model(cfg)


def test_maps_that_the_backbone_lacks() -> None:
    for name in ("FCNDecoder", "SemSegFPNDecoder"):
        cfg = yaml_config(name, "SemanticSegmentor")
        cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "p9"]
        with pytest.raises(ValueError, match="IN_FEATURES='p9'.*'res2', 'res3'"):
            build_model(cfg)
