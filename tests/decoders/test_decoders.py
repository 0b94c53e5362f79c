"""The battery that every decoder passes: a new one is one more row.

Shape letters: B images, C channels, K classes, h w a feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from contrast_d2.decoders import (
    DeepLabV3Decoder,
    DeepLabV3PlusDecoder,
    FCNDecoder,
    OCRDecoder,
    SemSegFPNDecoder,
    UPerNetDecoder,
)
from contrast_d2.structures import SegOutput

NUM_CLASSES = 5
BACKBONE = {
    "res2": ShapeSpec(channels=6, stride=4),
    "res3": ShapeSpec(channels=8, stride=8),
    "res4": ShapeSpec(channels=8, stride=16),
    "res5": ShapeSpec(channels=10, stride=32),
}
DILATED = {
    "res2": ShapeSpec(channels=6, stride=4),
    "res4": ShapeSpec(channels=10, stride=8),
    "res5": ShapeSpec(channels=12, stride=8),
}
DEEP = {name: DILATED[name] for name in ("res4", "res5")}
PYRAMID = {f"p{i}": ShapeSpec(channels=16, stride=2**i) for i in range(2, 6)}


class Row(NamedTuple):
    """A decoder over maps of `shapes`, all of which it uses.

    `features` are the channels of what it hands on, `stride` that of its logits and `aux` that of
    its auxiliary ones. `one_image`: it can train on a single image.
    """

    name: str
    build: Callable[..., nn.Module]
    shapes: dict[str, ShapeSpec]
    features: dict[str, int]
    stride: int = 4
    aux: int | None = None
    one_image: bool = True


def row_of(
    name: str,
    decoder: type[nn.Module],
    shapes: dict[str, ShapeSpec],
    features: dict[str, int],
    arguments: dict[str, Any],
    **more,
) -> Row:
    def build(shapes: dict[str, ShapeSpec], **others: Any) -> nn.Module:
        return decoder(shapes, num_classes=NUM_CLASSES, **{**arguments, **others})

    return Row(name, build, shapes, features, **more)


ROWS = [
    row_of(
        "semfpn",
        SemSegFPNDecoder,
        BACKBONE,
        {"p2": 24, "p3": 24, "p4": 24, "p5": 24, "pre_logits": 32},
        dict(fpn_channels=24, conv_dims=32),
    ),
    row_of(
        "semfpn-on-a-pyramid",
        SemSegFPNDecoder,
        PYRAMID,
        {"pre_logits": 32},
        dict(fpn_channels=None, conv_dims=32),
    ),
    row_of("fcn", FCNDecoder, BACKBONE, {"concat": 32, "pre_logits": 32}, {}),
    row_of(
        "fcn-3x3",
        FCNDecoder,
        BACKBONE,
        {"concat": 32, "pre_logits": 64},
        dict(kernel_size=3, hidden_channels=64, dropout=0.1),
    ),
    row_of(
        "deeplabv3",
        DeepLabV3Decoder,
        {"res5": DILATED["res5"]},
        {"pre_logits": 32},
        dict(channels=32),
        stride=8,
    ),
    row_of(
        "deeplabv3-aux",
        DeepLabV3Decoder,
        DEEP,
        {"pre_logits": 32},
        dict(channels=32, aux_feature="res4", aux_channels=32),
        stride=8,
        aux=8,
    ),
    row_of(
        "deeplabv3plus",
        DeepLabV3PlusDecoder,
        DILATED,
        {"pre_logits": 32},
        dict(channels=32, low_level_channels=32, aux_feature="res4", aux_channels=32),
        aux=8,
    ),
    row_of(
        "deeplabv3plus-separable",
        DeepLabV3PlusDecoder,
        {"res2": DILATED["res2"], "res5": ShapeSpec(channels=32, stride=16)},
        {"pre_logits": 32},
        dict(channels=32, low_level_channels=32, separable=True),
    ),
    row_of(
        "ocr",
        OCRDecoder,
        BACKBONE,
        {"concat": 32, "pre_logits": 64},
        dict(channels=64, key_channels=32),
        aux=4,
    ),
    row_of(
        "ocr-resnet",
        OCRDecoder,
        DEEP,
        {"concat": 12, "pre_logits": 64},
        dict(
            channels=64,
            key_channels=32,
            in_features=["res5"],
            region_feature="res4",
            region_channels=32,
            region_kernel_size=3,
        ),
        stride=8,
        aux=8,
    ),
    row_of(
        "upernet",
        UPerNetDecoder,
        BACKBONE,
        {"p2": 32, "p3": 32, "p4": 32, "p5": 32, "pre_logits": 32},
        dict(channels=32, aux_feature="res4", aux_channels=32),
        aux=16,
        one_image=False,
    ),
    row_of(
        "upernet-gn",
        UPerNetDecoder,
        DEEP,
        {"p4": 64, "p5": 64, "pre_logits": 64},
        dict(channels=64, norm="GN"),
        stride=8,
    ),
]


@pytest.fixture(params=ROWS, ids=[row.name for row in ROWS])
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


def inputs(
    shapes: dict[str, ShapeSpec], height: int = 64, width: int = 96, images: int = 2
) -> dict[str, Tensor]:
    """Maps of images of the given size in pixels."""
    return {
        name: torch.randn(images, s.channels, -(-height // s.stride), -(-width // s.stride))
        for name, s in shapes.items()
    }


def scores(output: SegOutput) -> Tensor:
    """A number that depends on all logits."""
    maps = [x for x in (output.logits, output.aux_logits) if x is not None]
    return sum((x * torch.randn_like(x)).sum() for x in maps)


# The second has an odd number of rows and columns at every stride, and one row at the coarsest.
EXACT_SIZES = [(64, 96), (32, 160)]
# No multiple of any stride: not for detectron2's pyramid, for which the segmentor pads images.
ODD_SIZE = (101, 67)


def test_output(row: Row, subtests: pytest.Subtests) -> None:
    for height, width in EXACT_SIZES + [ODD_SIZE] * (not row.name.startswith("semfpn")):
        with subtests.test(height=height, width=width):
            output = row.build(row.shapes).decode(inputs(row.shapes, height, width))
            assert isinstance(output, SegOutput)
            size = (-(-height // row.stride), -(-width // row.stride))
            assert output.logits.shape == (2, NUM_CLASSES, *size)
            assert (output.aux_logits is None) == (row.aux is None)
            if row.aux is not None:
                size = (-(-height // row.aux), -(-width // row.aux))
                assert output.aux_logits.shape == (2, NUM_CLASSES, *size)
            assert {name: x.shape[1] for name, x in output.features.items()} == row.features


def test_auxiliary_heads_do_not_run_in_evaluation(row: Row) -> None:
    decoder = row.build(row.shapes).eval()
    ran = []
    for name, module in decoder.named_modules():
        if name.startswith("aux_head."):
            module.register_forward_hook(lambda *call: ran.append(call))
    aux_logits = decoder.decode(inputs(row.shapes)).aux_logits
    # OCR's logits depend on its auxiliary ones.
    assert (aux_logits is not None) == isinstance(decoder, OCRDecoder)
    assert not ran


def test_pre_logits_are_classified(row: Row) -> None:
    decoder = row.build(row.shapes)
    given = []
    if hasattr(decoder, "dropout"):
        decoder.dropout.register_forward_pre_hook(lambda _, x: given.extend(x))
        output = decoder.decode(inputs(row.shapes))
        assert output.features["pre_logits"] is given[0]
    output = decoder.eval().decode(inputs(row.shapes))
    assert torch.equal(output.logits, decoder.predictor(output.features["pre_logits"]))


# detectron2's own choice of norms aside.
OWN_ROWS = [row for row in ROWS if not row.name.startswith("semfpn")]


@pytest.mark.parametrize("row", OWN_ROWS, ids=[row.name for row in OWN_ROWS])
def test_norm_is_that_of_all_convolutions(row: Row) -> None:
    def norms(norm: str) -> set[str]:
        modules = row.build(row.shapes, norm=norm).modules()
        return {type(m).__name__ for m in modules if "Norm" in type(m).__name__}

    assert norms("BN") == {"BatchNorm2d"}
    assert norms("SyncBN") == {"SyncBatchNorm"}
    assert norms("GN") == {"GroupNorm"}
    assert norms("") == set()
    bare = row.build(row.shapes, norm="").modules()
    # Nothing else shifts what comes out of a convolution.
    assert all(m.bias is not None for m in bare if isinstance(m, nn.Conv2d))


def test_one_image_in_training(row: Row) -> None:
    decoder = row.build(row.shapes)
    features = inputs(row.shapes, images=1)
    if row.one_image:
        assert decoder.decode(features).logits.isfinite().all()
    else:
        with pytest.raises(ValueError, match="batch of one image.*norm="):
            decoder.decode(features)
    assert decoder.eval().decode(features).logits.isfinite().all()


def test_half_precision(row: Row) -> None:
    decoder = row.build(row.shapes).eval()
    features = inputs(row.shapes)
    with torch.no_grad():
        expected = decoder.decode(features).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = decoder.decode(features).logits
        halves = {name: x.bfloat16() for name, x in features.items()}
        cast = decoder.bfloat16().decode(halves).logits
    for logits in (autocast, cast):
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_other_maps_and_their_order_do_not_matter(row: Row) -> None:
    decoder = row.build(row.shapes).eval()
    reordered = row.build(dict(reversed(row.shapes.items()))).eval()
    reordered.load_state_dict(decoder.state_dict())
    features = inputs(row.shapes)
    more = {"res1": torch.randn(2, 3, 32, 48), **dict(reversed(features.items()))}
    assert torch.equal(decoder.decode(features).logits, reordered.decode(more).logits)


def test_backward_reaches_every_parameter_and_map(row: Row) -> None:
    decoder = row.build(row.shapes)
    features = {name: x.requires_grad_() for name, x in inputs(row.shapes).items()}
    scores(decoder.decode(features)).backward()
    tensors = {**dict(decoder.named_parameters()), **features}
    assert not [n for n, p in tensors.items() if p.grad is None or not p.grad.any()]


def test_state_dict_round_trip(row: Row) -> None:
    decoder, other = row.build(row.shapes).eval(), row.build(row.shapes).eval()
    features = inputs(row.shapes)
    expected = decoder.decode(features).logits
    assert not torch.equal(other.decode(features).logits, expected)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other.decode(features).logits, expected)


def test_logits_stay_in_place(row: Row) -> None:
    # A change in the top left corner of all maps must show there most.
    decoder = row.build(row.shapes).eval()
    before = inputs(row.shapes, 128, 256)
    after = {name: x.clone() for name, x in before.items()}
    for x in after.values():
        x[..., :1, :1] += 20.0
    with torch.no_grad():
        difference = (
            (decoder.decode(after).logits - decoder.decode(before).logits).abs().amax(dim=(0, 1))
        )
    y, x = divmod(difference.argmax().item(), difference.shape[1])
    assert max(y, x) * row.stride < 64
