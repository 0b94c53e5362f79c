"""The battery that every backbone passes. Shape letters: B images, C channels, h w a map."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from contrast_d2.decoders import FCNDecoder
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.segmentor import ContrastiveSegmentor

from .rows import NAMES, ROWS, Row, wake_residuals

SIZE = (64, 96)


@pytest.fixture(scope="module", params=ROWS, ids=[row.name for row in ROWS])
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(scope="module")
def backbone(row: Row) -> nn.Module:
    torch.manual_seed(1)
    module = row.build()
    wake_residuals(module)
    return module


def maps(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return backbone.eval()(images)


def test_maps_are_as_announced(row: Row, backbone: nn.Module) -> None:
    announced = backbone.output_shape()
    assert {n: (s.channels, s.stride) for n, s in announced.items()} == {
        n: (c, s) for n, c, s in zip(NAMES, row.channels, row.strides, strict=True)
    }
    found = maps(backbone, torch.randn(2, 3, *SIZE))
    assert list(found) == list(NAMES)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        name: (2, shape.channels, SIZE[0] // shape.stride, SIZE[1] // shape.stride)
        for name, shape in announced.items()
    }


def test_backward_reaches_every_parameter(backbone: nn.Module) -> None:
    backbone.train().zero_grad()
    for module in backbone.modules():
        if isinstance(module, DropPath):  # which would skip a block now and then
            module.eval()
    found = backbone(torch.randn(2, 3, *SIZE))
    sum((x * torch.randn_like(x)).sum() for x in found.values()).backward()
    untouched = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert not untouched
    backbone.zero_grad()


def test_state_dict_round_trip(row: Row, backbone: nn.Module) -> None:
    images = torch.randn(1, 3, *SIZE)
    other = row.build()
    before = maps(other, images)["res5"]
    other.load_state_dict(backbone.state_dict())
    after, expected = maps(other, images), maps(backbone, images)
    assert not torch.equal(before, expected["res5"])
    assert all(torch.equal(after[name], expected[name]) for name in NAMES)


def test_a_subset_of_the_maps(row: Row, backbone: nn.Module, subtests: pytest.Subtests) -> None:
    for names in [("res3", "res5"), ("res4", "res2")]:
        with subtests.test(names=names):
            images = torch.randn(1, 3, *SIZE)
            subset = row.build(out_features=names)
            weights = backbone.state_dict()
            subset.load_state_dict({name: weights[name] for name in subset.state_dict()})
            found, expected = maps(subset, images), maps(backbone, images)
            assert set(found) == set(names) == set(subset.output_shape())
            assert all(torch.equal(found[name], expected[name]) for name in names)


def test_odd_sizes_are_padded_to_exact_strides(row: Row, backbone: nn.Module) -> None:
    model = ContrastiveSegmentor(
        backbone=backbone,
        sem_seg_head=FCNDecoder(backbone.output_shape(), num_classes=3, hidden_channels=8),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        seg_loss=SegLoss(CrossEntropyLoss()),
    )
    seen: list[dict[str, Tensor]] = []
    handle = backbone.register_forward_hook(lambda module, args, output: seen.append(output))
    image, labels = torch.randn(3, 61, 83), torch.randint(0, 3, (61, 83))
    with torch.no_grad():
        loss = model.train()([{"image": image, "sem_seg": labels}] * 2)["loss_sem_seg"]
        scores = model.eval()([{"image": image}])[0]["sem_seg"]
    handle.remove()
    assert scores.shape == (3, 61, 83)
    assert scores.isfinite().all() and loss.isfinite()
    coarsest = max(row.strides)
    padded = [-(-side // coarsest) * coarsest for side in (61, 83)]
    for output in seen:
        sizes = {name: tuple(x.shape[-2:]) for name, x in output.items()}
        assert sizes == {
            name: (padded[0] // stride, padded[1] // stride)
            for name, stride in zip(NAMES, row.strides, strict=True)
        }
    assert len(seen) == 2
