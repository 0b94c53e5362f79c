"""OCR against its equations, pixel by pixel and region by region in float64.

Shape letters: B images, C channels, D key channels, K classes, h w a feature map.
"""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from contrast_d2.decoders import OCRDecoder
from contrast_d2.decoders.ocr import ObjectAttention, object_regions

SHAPES = {"res4": ShapeSpec(channels=3, stride=16), "res5": ShapeSpec(channels=4, stride=32)}


def regions_reference(pixels: Tensor, region_logits: Tensor) -> Tensor:
    """(B, C, K, 1), by loops."""
    (B, C, h, w), K = pixels.shape, region_logits.shape[1]
    places = [(y, x) for y in range(h) for x in range(w)]
    regions = torch.zeros(B, C, K, 1, dtype=torch.float64)
    for b in range(B):
        for k in range(K):
            exps = [math.exp(region_logits[b, k, y, x]) for y, x in places]
            for exp, (y, x) in zip(exps, places, strict=True):
                regions[b, :, k, 0] += exp / sum(exps) * pixels[b, :, y, x].double()
    return regions


def attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, D, h, w) from queries (B, D, h, w), keys and values (B, D, K, 1), by loops."""
    B, D, h, w = query.shape
    context = torch.zeros(B, D, h, w, dtype=torch.float64)
    for b in range(B):
        for y in range(h):
            for x in range(w):
                products = key[b, :, :, 0].double().T @ query[b, :, y, x].double()
                exps = [math.exp(product / math.sqrt(D)) for product in products]
                for k, exp in enumerate(exps):
                    context[b, :, y, x] += exp / sum(exps) * value[b, :, k, 0].double()
    return context


def bare_attention(channels: int) -> ObjectAttention:
    """With what surrounds the attention taken away."""
    attention = ObjectAttention(channels, channels)
    attention.query = attention.output = nn.Identity()
    attention.key, attention.value = nn.ReLU(), nn.Tanh()
    return attention


def test_regions() -> None:
    pixels = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    logits = 3 * torch.randn(2, 6, 4, 5, dtype=torch.float64)
    regions = object_regions(pixels, logits)
    torch.testing.assert_close(regions, regions_reference(pixels, logits))


def test_attention() -> None:
    pixels = 2 * torch.randn(2, 4, 3, 5, dtype=torch.float64)
    regions = 2 * torch.randn(2, 4, 6, 1, dtype=torch.float64)
    context = bare_attention(4)(pixels, regions)
    expected = attention_reference(pixels, regions.relu(), regions.tanh())
    torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_is_in_full_precision_under_autocast(dtype: torch.dtype) -> None:
    # Shares of 9216 pixels, and similarities whose halves are coarse.
    pixels = 8 * torch.randn(1, 16, 96, 96)
    logits = 8 * torch.randn(1, 4, 96, 96)
    attention = bare_attention(16)
    expected = object_regions(pixels, logits)
    context = attention(pixels, expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(object_regions(pixels, logits), expected)
        assert torch.equal(attention(pixels, expected), context)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    # Similarities of about 100, which halves round to quarters or so.
    pixels, regions = 8 * torch.randn(2, 16, 7, 9), 8 * torch.randn(2, 16, 5, 1)
    pixels, regions = pixels.to(dtype), regions.to(dtype)
    attention = bare_attention(16)
    context = attention(pixels, regions)
    # As `value` hands it on, in halves.
    exact = attention_reference(pixels, regions.relu(), regions.tanh())
    torch.testing.assert_close(context, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    # 490,000 pixels, of whose shares fp16 has two digits.
    pixels, logits = torch.full((1, 1, 700, 700), 8.0), torch.zeros(1, 1, 700, 700)
    assert object_regions(pixels.to(dtype), logits.to(dtype)).item() == 8.0


@pytest.mark.parametrize(
    "arguments",
    [
        dict(region_channels=6),
        dict(in_features=["res5"], region_feature="res4", region_kernel_size=3),
    ],
    ids=["joined", "resnet"],
)
def test_the_parts_in_order(arguments: dict) -> None:
    decoder = OCRDecoder(SHAPES, num_classes=5, channels=8, key_channels=6, **arguments).eval()
    maps = {"res4": torch.randn(2, 3, 8, 12), "res5": torch.randn(2, 4, 4, 6)}
    output = decoder.decode(maps)

    def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
        return nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)

    joined, source = maps["res5"], maps["res4"]
    if "in_features" not in arguments:
        joined = source = torch.cat([source, resized(joined, (8, 12))], dim=1)
    assert torch.equal(output.features["concat"], joined)
    pixels = decoder.pixels(joined)
    # At the size of the map that they are predicted from, also where pixels are coarser.
    assert torch.equal(output.aux_logits, decoder.region_head(source))
    assert output.aux_logits.shape[-2:] == (8, 12)
    regions = object_regions(pixels, resized(output.aux_logits, pixels.shape[-2:]))
    context = decoder.attention(pixels, regions)
    pre_logits = decoder.fuse(torch.cat([context, pixels], dim=1))
    assert torch.equal(output.features["pre_logits"], pre_logits)


def test_the_loss_of_the_pixels_trains_the_regions() -> None:
    decoder = OCRDecoder(SHAPES, num_classes=5, channels=8, key_channels=6)
    maps = {"res4": torch.randn(2, 3, 8, 12), "res5": torch.randn(2, 4, 4, 6)}
    logits = decoder.decode(maps).logits
    (logits * torch.randn_like(logits)).sum().backward()
    assert decoder.region_head.predictor.weight.grad.any()


def test_a_change_of_one_region_reaches_all_its_pixels() -> None:
    # What plain convolutions cannot: far pixels of the same region hear of it.
    decoder = OCRDecoder(SHAPES, num_classes=5, channels=8, key_channels=6).eval()
    maps = {"res4": torch.randn(1, 3, 30, 40), "res5": torch.randn(1, 4, 15, 20)}
    changed = {**maps, "res4": maps["res4"].clone()}
    changed["res4"][..., :2, :2] += 20
    difference = (decoder.decode(changed).logits - decoder.decode(maps).logits).abs().amax(dim=1)
    assert (difference > 0).float().mean() > 0.9


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="in_features='res9'.*'res4', 'res5'"):
        OCRDecoder(SHAPES, num_classes=5, in_features=["res9"])
    with pytest.raises(ValueError, match="region_feature='res3'.*'res4', 'res5'"):
        OCRDecoder(SHAPES, num_classes=5, region_feature="res3")
    with pytest.raises(ValueError, match="at least one"):
        OCRDecoder(SHAPES, num_classes=5, in_features=[])
