"""The battery that every decoder passes: a new one is one more row.

Shape letters: B images, C channels, K classes, h w a feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from contrast_d2.decoders import FCNDecoder, SemSegFPNDecoder
from contrast_d2.structures import SegOutput

NUM_CLASSES = 5
BACKBONE = {
    "res2": ShapeSpec(channels=6, stride=4),
    "res3": ShapeSpec(channels=8, stride=8),
    "res4": ShapeSpec(channels=10, stride=16),
    "res5": ShapeSpec(channels=12, stride=32),
}
PYRAMID = {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in range(2, 6)}


class Row(NamedTuple):
    """A decoder over maps of `shapes`; `features` are the channels of what it hands on."""

    name: str
    build: Callable[[dict[str, ShapeSpec]], nn.Module]
    shapes: dict[str, ShapeSpec]
    features: dict[str, int]


ROWS = [
    Row(
        "semfpn",
        lambda shapes: SemSegFPNDecoder(
            shapes, num_classes=NUM_CLASSES, fpn_channels=24, conv_dims=32
        ),
        BACKBONE,
        {"p2": 24, "p3": 24, "p4": 24, "p5": 24, "pre_logits": 32},
    ),
    Row(
        "semfpn-on-a-pyramid",
        lambda shapes: SemSegFPNDecoder(
            shapes, num_classes=NUM_CLASSES, fpn_channels=None, conv_dims=32
        ),
        PYRAMID,
        {"pre_logits": 32},
    ),
    Row(
        "fcn",
        lambda shapes: FCNDecoder(shapes, num_classes=NUM_CLASSES),
        BACKBONE,
        {"concat": 36, "pre_logits": 36},
    ),
]


@pytest.fixture(params=ROWS, ids=[row.name for row in ROWS])
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


def inputs(shapes: dict[str, ShapeSpec], height: int = 64, width: int = 96) -> dict[str, Tensor]:
    """Maps of two images of the given size in pixels."""
    return {
        name: torch.randn(2, s.channels, height // s.stride, width // s.stride)
        for name, s in shapes.items()
    }


# The second has an odd number of rows and columns at every stride, and one at the coarsest.
@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 160)])
def test_output(row: Row, height: int, width: int) -> None:
    output = row.build(row.shapes)(inputs(row.shapes, height, width))
    assert isinstance(output, SegOutput)
    assert output.logits.shape == (2, NUM_CLASSES, height // 4, width // 4)
    assert output.aux_logits is None
    assert {name: x.shape[1] for name, x in output.features.items()} == row.features


def test_other_maps_and_their_order_do_not_matter(row: Row) -> None:
    decoder = row.build(row.shapes).eval()
    reordered = row.build(dict(reversed(row.shapes.items()))).eval()
    reordered.load_state_dict(decoder.state_dict())
    features = inputs(row.shapes)
    more = {"res1": torch.randn(2, 3, 32, 48), **dict(reversed(features.items()))}
    assert torch.equal(decoder(features).logits, reordered(more).logits)


def test_backward_reaches_every_parameter_and_map(row: Row) -> None:
    decoder = row.build(row.shapes)
    features = {name: x.requires_grad_() for name, x in inputs(row.shapes).items()}
    logits = decoder(features).logits
    (logits * torch.randn_like(logits)).sum().backward()
    tensors = {**dict(decoder.named_parameters()), **features}
    assert not [n for n, p in tensors.items() if p.grad is None or not p.grad.any()]


def test_state_dict_round_trip(row: Row) -> None:
    decoder, other = row.build(row.shapes).eval(), row.build(row.shapes).eval()
    features = inputs(row.shapes)
    expected = decoder(features).logits
    assert not torch.equal(other(features).logits, expected)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(features).logits, expected)


def test_logits_stay_in_place(row: Row) -> None:
    # A change in the top left corner of all maps must show there, not elsewhere.
    decoder = row.build(row.shapes).eval()
    before = inputs(row.shapes, 128, 256)
    after = {name: x.clone() for name, x in before.items()}
    for x in after.values():
        x[..., :1, :1] += 20.0
    with torch.no_grad():
        difference = (decoder(after).logits - decoder(before).logits).abs().amax(dim=(0, 1))
    largest = difference.argmax().item()
    assert largest // difference.shape[1] < 16 and largest % difference.shape[1] < 16
