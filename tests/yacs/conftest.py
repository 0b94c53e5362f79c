"""Parts as a user's module would register them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY, Backbone
from torch import Tensor, nn

from contrast_d2.structures import SegOutput
from contrast_d2.yacs import CONFIG_REGISTRY


class TwoStages(Backbone):
    """Two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.coarse = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"fine": fine, "coarse": self.coarse(fine)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        fine, coarse = self.fine.out_channels, self.coarse.out_channels
        return {
            "fine": ShapeSpec(channels=fine, stride=4),
            "coarse": ShapeSpec(channels=coarse, stride=8),
        }


class OneMap(nn.Module):
    """Classifies the finest map."""

    def __init__(self, input_shape: dict[str, ShapeSpec], num_classes: int, depth: int) -> None:
        super().__init__()
        (self.feature, shape), *_ = input_shape.items()
        self.convs = nn.Sequential(
            *(nn.Conv2d(shape.channels, shape.channels, 1) for _ in range(depth))
        )
        self.predictor = nn.Conv2d(shape.channels, num_classes, 1)

    def forward(self, features: dict[str, Tensor]) -> SegOutput:
        x = self.convs(features[self.feature])
        return SegOutput(self.predictor(x), None, {"pre_logits": x})


def add_two_stages_config(cfg: CfgNode) -> None:
    cfg.MODEL.TWO_STAGES = CfgNode({"WIDTH": 8, "UNUSED": 0, "EXACT": False})
    cfg.MODEL.SEM_SEG_HEAD.DEPTH = 1


def build_two_stages(cfg: CfgNode, input_shape: ShapeSpec) -> TwoStages:
    settings = cfg.MODEL.TWO_STAGES
    backbone = TwoStages(settings.WIDTH)
    if settings.EXACT:  # as builders that look at values do; impossible without memory
        assert float(backbone.fine.weight.detach().abs().max().item()) > 0
    return backbone


def build_one_map(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> OneMap:
    head = cfg.MODEL.SEM_SEG_HEAD
    return OneMap(input_shape, head.NUM_CLASSES, head.DEPTH)


@pytest.fixture
def own_parts() -> Iterator[None]:
    """Registers a backbone, a decoder and their keys for the time of a test."""
    rows = (
        (BACKBONE_REGISTRY, build_two_stages),
        (SEM_SEG_HEADS_REGISTRY, build_one_map),
        (CONFIG_REGISTRY, add_two_stages_config),
    )
    for registry, item in rows:
        registry.register(item)
    yield
    for registry, item in rows:
        del registry._obj_map[item.__name__]


@pytest.fixture
def batch() -> list[dict[str, Tensor]]:
    """Two images with labels of 11 classes in squares of 8 pixels."""
    labels = torch.randint(0, 11, (2, 8, 12)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    return [{"image": image, "sem_seg": label} for image, label in zip(images, labels, strict=True)]
