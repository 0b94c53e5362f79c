"""Reading drawn pixels off maps. Shape letters: A pixels, D embedding width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contrast_d2.contrast import gather, gather_embeddings, gather_pixels

SHAPE = (3, 5, 4, 6)
# In no order, with neighbours in memory, and the corners of the map.
IMAGE = torch.tensor([1, 0, 2, 1, 0, 2])
PIXEL = torch.tensor([11, 0, 23, 10, 23, 7])
# The first three again, as the padding of a draw of fixed size may have them.
REPEATED = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])


def contiguous(maps: Tensor) -> Tensor:
    return maps.contiguous()


def channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def permuted_tokens(maps: Tensor) -> Tensor:
    """As transformers yield maps: (B, h * w, C) tokens seen as a map."""
    tokens = maps.flatten(2).transpose(1, 2).contiguous()
    return tokens.transpose(1, 2).unflatten(2, maps.shape[2:])


def slice_of_a_map(maps: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(maps, (1, 2, 3, 1))
    return padded[:, :, 3:-1, 1:-2]


def part_of_channels(maps: Tensor) -> Tensor:
    joined = torch.cat([maps, maps], dim=1).contiguous(memory_format=torch.channels_last)
    return joined[:, : maps.shape[1]]


LAYOUTS = [contiguous, channels_last, permuted_tokens, slice_of_a_map, part_of_channels]


def by_loop(maps: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    places = [divmod(p, maps.shape[3]) for p in pixel.tolist()]
    return torch.stack([maps[b, :, y, x] for b, (y, x) in zip(image.tolist(), places, strict=True)])


@pytest.fixture(params=[1, 300, 1 << 20], autouse=True)
def group_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plane at a time, some, all."""
    monkeypatch.setattr(gather, "_GROUP_BYTES", request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distinct", [True, False])
def test_values_and_gradients(layout, dtype: torch.dtype, distinct: bool) -> None:
    maps = layout(torch.randn(SHAPE).to(dtype)).requires_grad_()
    reference = maps.detach().clone().requires_grad_()
    rows = slice(None) if distinct else REPEATED
    image, pixel = IMAGE[rows], PIXEL[rows]
    found = gather_pixels(maps, image, pixel, distinct=distinct)
    expected = by_loop(reference, image, pixel)
    assert found.dtype == dtype and torch.equal(found, expected)
    # Integers, so that sums of two are exact in every type.
    weight = torch.randint(1, 9, expected.shape).to(dtype)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(maps.grad, reference.grad)


@pytest.mark.parametrize(
    ("layout", "memory_format"),
    [
        (contiguous, torch.contiguous_format),
        (channels_last, torch.channels_last),
        (permuted_tokens, torch.channels_last),
        (slice_of_a_map, torch.contiguous_format),
        (part_of_channels, torch.channels_last),
    ],
)
def test_the_gradient_follows_the_memory_format(layout, memory_format) -> None:
    maps = layout(torch.randn(SHAPE)).requires_grad_()
    (gradient,) = torch.autograd.grad(gather_pixels(maps, IMAGE, PIXEL).sum(), maps)
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("distinct", [True, False])
def test_gradcheck(layout, distinct: bool) -> None:
    maps = layout(torch.randn(2, 3, 2, 3, dtype=torch.float64)).requires_grad_()
    image, pixel = torch.tensor([0, 1, 1]), torch.tensor([5, 0, 3])
    assert torch.autograd.gradcheck(
        lambda x: gather_pixels(x, image, pixel, distinct=distinct), maps
    )


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_gradient_is_the_only_map_that_is_made(layout) -> None:
    maps = layout(torch.randn(SHAPE)).requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        drawn = gather_pixels(maps, IMAGE, PIXEL, distinct=True)
    assert sizes == [len(IMAGE)] * 2
    with torch.profiler.profile(profile_memory=True) as profile:
        drawn.sum().backward()
    allocated = [e.nbytes for e in profile.profiler.kineto_results.events() if e.nbytes() > 0]
    assert sum(size() >= maps.numel() * 4 for size in allocated) == 1


def test_second_derivative_is_refused() -> None:
    maps = torch.randn(SHAPE, requires_grad=True)
    drawn = gather_pixels(maps, IMAGE, PIXEL)
    with pytest.raises(RuntimeError, match="gather_pixels cannot be differentiated twice"):
        torch.autograd.grad(drawn.square().sum(), maps, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drawn_embeddings_are_unit_vectors(dtype: torch.dtype) -> None:
    embeddings = (10 * torch.randn(SHAPE)).to(dtype)
    drawn = gather_embeddings(embeddings, IMAGE, PIXEL)
    assert drawn.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, vector in zip(drawn, by_loop(embeddings, IMAGE, PIXEL).to(drawn.dtype), strict=True):
        torch.testing.assert_close(row, vector / vector.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("distinct", [True, False])
def test_an_empty_draw_stays_connected(layout, distinct: bool) -> None:
    embeddings = layout(torch.randn(SHAPE)).requires_grad_()
    nothing = torch.empty(0, dtype=torch.long)
    drawn = gather_embeddings(embeddings, nothing, nothing, distinct=distinct)
    assert drawn.shape == (0, 5)
    (gradient,) = torch.autograd.grad(drawn.sum(), embeddings)
    assert torch.equal(gradient, torch.zeros(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unit_vectors_are_those_of_normalize(dtype: torch.dtype) -> None:
    rows = (torch.randn(7, 5, dtype=dtype) * torch.logspace(-6, 6, 7, dtype=dtype)[:, None]).clone()
    rows[3] = 0
    rows.requires_grad_()
    weights = torch.randn(7, 5, dtype=dtype)
    found, expected = gather.unit_vectors(rows), torch.nn.functional.normalize(rows, dim=1)
    torch.testing.assert_close(found, expected)
    (d_found,) = torch.autograd.grad((found * weights).sum(), rows)
    (d_expected,) = torch.autograd.grad((expected * weights).sum(), rows)
    scale = d_expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(d_found / scale, d_expected / scale)
    assert d_found[3].ne(0).all()
