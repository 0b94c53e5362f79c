"""UPerNet against its parts written out.

Shape letters: B images, C channels, K classes, h w a feature map.
"""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2.decoders import UPerNetDecoder
from contrast_d2.decoders.upernet import grid_means

SHAPES = {
    "res2": ShapeSpec(channels=3, stride=4),
    "res3": ShapeSpec(channels=4, stride=8),
    "res4": ShapeSpec(channels=5, stride=16),
    "res5": ShapeSpec(channels=6, stride=32),
}


def inputs(images: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of sizes that do not divide, as those of an unpadded image."""
    sizes = {"res2": (29, 34), "res3": (15, 17), "res4": (8, 9), "res5": (4, 5)}
    return {
        name: torch.randn(images, SHAPES[name].channels, *size, dtype=dtype)
        for name, size in sizes.items()
    }


# Divisible, not divisible, and smaller than the grid.
def test_grid_means(subtests: pytest.Subtests) -> None:
    for size in [(12, 18), (7, 11), (4, 5), (1, 1)]:
        with subtests.test(size=size):
            x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
            means = grid_means(x, (1, 2, 3, 6))
            expected = [F.adaptive_avg_pool2d(x, n) for n in (1, 2, 3, 6)]
            for mean, other in zip(means, expected, strict=True):
                torch.testing.assert_close(mean, other)
                direction = torch.randn_like(mean)
                ours, theirs = (
                    torch.autograd.grad(y, x, direction, retain_graph=True)[0]
                    for y in (mean, other)
                )
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grid_means_of_half_precision(dtype: torch.dtype) -> None:
    # A sum of 4096 values of 100 would overflow fp16.
    x = (100 + 10 * torch.randn(1, 3, 64, 64)).to(dtype)
    for mean, size in zip(grid_means(x, (1, 6)), (1, 6), strict=True):
        assert mean.dtype == dtype
        exact = F.adaptive_avg_pool2d(x.double(), size)
        torch.testing.assert_close(mean.double(), exact, rtol=2**-6, atol=0)


def conv(layer: Conv2d, x: Tensor) -> Tensor:
    """A convolution without norm, and ReLU."""
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2).relu()


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def test_equals_the_papers_decoder_written_out() -> None:
    decoder = UPerNetDecoder(SHAPES, num_classes=3, channels=7, norm="").double().eval()
    maps = inputs(dtype=torch.float64)
    res2, res3, res4, res5 = maps.values()
    pooling = decoder.pooling
    pools = [
        resized(conv(branch, F.adaptive_avg_pool2d(res5, size)), res5)
        for size, branch in zip((1, 2, 3, 6), pooling.branches, strict=True)
    ]
    p5 = conv(pooling.fuse, torch.cat([res5, *pools], dim=1))
    sum4 = conv(decoder.laterals[2], res4) + resized(p5, res4)
    sum3 = conv(decoder.laterals[1], res3) + resized(sum4, res3)
    sum2 = conv(decoder.laterals[0], res2) + resized(sum3, res2)
    sums = zip(decoder.outputs, (sum2, sum3, sum4), strict=True)
    p2, p3, p4 = (conv(output, x) for output, x in sums)
    joined = torch.cat([p2, *(resized(x, p2) for x in (p3, p4, p5))], dim=1)
    expected = {"p2": p2, "p3": p3, "p4": p4, "p5": p5, "pre_logits": conv(decoder.fuse, joined)}

    output = decoder.decode(maps)
    assert output.features.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(output.features[name], x)


def test_the_deepest_map_is_p5() -> None:
    shapes = {name: SHAPES[name] for name in ("res5", "res3")}
    decoder = UPerNetDecoder(shapes, num_classes=3, channels=8)
    output = decoder.decode(inputs())
    sizes = {name: tuple(x.shape[-2:]) for name, x in output.features.items()}
    assert sizes == {"p4": (15, 17), "p5": (4, 5), "pre_logits": (15, 17)}


def test_one_image_and_norms_that_can_train_on_it() -> None:
    maps = inputs(images=1)
    decoder = UPerNetDecoder(SHAPES, num_classes=3, channels=32)
    with pytest.raises(ValueError, match='batch of one image.*model.sem_seg_head.norm="GN"'):
        decoder.decode(maps)
    # None of the running statistics may have moved by then.
    assert not any(b.any() for n, b in decoder.named_buffers() if n.endswith("running_mean"))
    for norm in ("GN", "", "FrozenBN"):
        UPerNetDecoder(SHAPES, num_classes=3, channels=64, norm=norm).decode(maps)
    UPerNetDecoder(SHAPES, num_classes=3, channels=32, pool_sizes=(2, 3)).decode(maps)
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    decoder.decode(maps)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="aux_feature='res9'.*'res2', 'res3', 'res4', 'res5'"):
        UPerNetDecoder(SHAPES, num_classes=3, aux_feature="res9")
    with pytest.raises(ValueError, match=r"pool_sizes=\[0, 2\]"):
        UPerNetDecoder(SHAPES, num_classes=3, pool_sizes=(0, 2))
    with pytest.raises(ValueError, match="at least one feature map"):
        UPerNetDecoder({}, num_classes=3)
    with pytest.raises(ValueError, match="dropout=-0.1"):
        UPerNetDecoder(SHAPES, num_classes=3, dropout=-0.1)
