"""Sets of embeddings: read off maps, and summed by class."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import (
    ClassSums,
    class_sums,
    gather_embeddings,
    gather_pixels,
    mean_similarities,
    sets,
)

SHAPE = (3, 5, 4, 6)
# In no order, with neighbours in memory, and the corners of the map.
IMAGE = torch.tensor([1, 0, 2, 1, 0, 2])
PIXEL = torch.tensor([11, 0, 23, 10, 23, 7])
# The first three again, as the padding of a draw of fixed size may have them.
REPEATED = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])


def permuted_tokens(maps: Tensor) -> Tensor:
    """As transformers yield maps: (B, h * w, C) tokens seen as a map."""
    tokens = maps.flatten(2).transpose(1, 2).contiguous()
    return tokens.transpose(1, 2).unflatten(2, maps.shape[2:])


def slice_of_a_map(maps: Tensor) -> Tensor:
    return F.pad(maps, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]


def part_of_channels(maps: Tensor) -> Tensor:
    joined = torch.cat([maps, maps], dim=1).contiguous(memory_format=torch.channels_last)
    return joined[:, : maps.shape[1]]


# And what the gradient's memory format is.
LAYOUTS = [
    (Tensor.contiguous, torch.contiguous_format),
    (lambda maps: maps.contiguous(memory_format=torch.channels_last), torch.channels_last),
    (permuted_tokens, torch.channels_last),
    (slice_of_a_map, torch.contiguous_format),
    (part_of_channels, torch.channels_last),
]


def by_loop(maps: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    where = [divmod(p, maps.shape[3]) for p in pixel.tolist()]
    return torch.stack([maps[b, :, y, x] for b, (y, x) in zip(image.tolist(), where, strict=True)])


@pytest.mark.parametrize("group_bytes", [1, 300, 1 << 20])  # one plane at a time, some, all
def test_values_and_gradients_are_those_of_indexing(monkeypatch, group_bytes: int) -> None:
    monkeypatch.setattr(sets, "_GROUP_BYTES", group_bytes)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for (layout, memory_format), dtype, distinct in itertools.product(
        LAYOUTS, dtypes, (True, False)
    ):
        maps = layout(torch.randn(SHAPE).to(dtype)).requires_grad_()
        reference = maps.detach().clone().requires_grad_()
        rows = slice(None) if distinct else REPEATED
        image, pixel = IMAGE[rows], PIXEL[rows]
        found = gather_pixels(maps, image, pixel, distinct=distinct)
        expected = by_loop(reference, image, pixel)
        assert found.dtype == dtype and torch.equal(found, expected)
        # Integers, so that sums of two are exact in every type.
        weight = torch.randint(1, 9, expected.shape).to(dtype)
        (gradient,) = torch.autograd.grad((found * weight).sum(), maps)
        (exact,) = torch.autograd.grad((expected * weight).sum(), reference)
        assert torch.equal(gradient, exact)
        assert gradient.is_contiguous(memory_format=memory_format)


def test_an_empty_draw_stays_connected() -> None:
    nothing = torch.empty(0, dtype=torch.long)
    for (layout, _), distinct in itertools.product(LAYOUTS, (True, False)):
        embeddings = layout(torch.randn(SHAPE)).requires_grad_()
        drawn = gather_embeddings(embeddings, nothing, nothing, distinct=distinct)
        assert drawn.shape == (0, 5)
        (gradient,) = torch.autograd.grad(drawn.sum(), embeddings)
        assert torch.equal(gradient, torch.zeros(SHAPE))


def test_the_gradient_is_the_only_map_that_is_made() -> None:
    for layout, _ in LAYOUTS[:2]:
        maps = layout(torch.randn(SHAPE)).requires_grad_()
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            drawn = gather_pixels(maps, IMAGE, PIXEL, distinct=True)
        assert [t.numel() for t in saved] == [len(IMAGE)] * 2
        with torch.profiler.profile(profile_memory=True) as profile:
            drawn.sum().backward()
        allocated = [e.nbytes() for e in profile.profiler.kineto_results.events()]
        assert sum(size >= maps.numel() * 4 for size in allocated) == 1


def test_second_derivative_is_refused() -> None:
    maps = torch.randn(SHAPE, requires_grad=True)
    drawn = gather_pixels(maps, IMAGE, PIXEL)
    with pytest.raises(RuntimeError, match="gather_pixels"):
        torch.autograd.grad(drawn.square().sum(), maps, create_graph=True)


def test_drawn_embeddings_are_unit_vectors() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        embeddings = (10 * torch.randn(SHAPE)).to(dtype)
        embeddings[IMAGE[3], :, PIXEL[3] // SHAPE[3], PIXEL[3] % SHAPE[3]] = 0
        drawn = gather_embeddings(embeddings, IMAGE, PIXEL)
        assert drawn.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        rows = by_loop(embeddings, IMAGE, PIXEL).to(drawn.dtype)
        torch.testing.assert_close(drawn, rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))


# ---- mean similarities

# Class 3 has one anchor and class 1 no contrast sample; negative labels do not count.
LABELS = [0, 2, 0, 1, -1, 1, 2, 0, 3, 1, 0, -1]
CONTRAST_LABELS = [2, -1, 0, 0, 4, 2, 3, -7]


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def by_pairs(
    anchors: Tensor, labels: list[int], contrast: Tensor, others: list[int], holds_anchors: bool
) -> list[float]:
    """Mean similarity of positive and negative pairs; none of a sample with itself."""
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for i, label in enumerate(labels):
        for j, other in enumerate(others):
            if label >= 0 and other >= 0 and not (holds_anchors and i == j):
                pairs[label == other].append(torch.dot(anchors[i], contrast[j]).item())
    return [sum(pairs[same]) / len(pairs[same]) for same in (True, False)]


def test_mean_similarities_are_those_of_all_pairs() -> None:
    anchors, more = unit(len(LABELS), 6), unit(len(CONTRAST_LABELS), 6)
    everything, all_labels = torch.cat([anchors, more]), LABELS + CONTRAST_LABELS
    cases = [
        (anchors, LABELS, True),
        (more, CONTRAST_LABELS, False),
        (everything, all_labels, True),
    ]
    own = class_sums(anchors, torch.tensor(LABELS, dtype=torch.int32), 5)
    assert own.counts.tolist() == [4, 3, 2, 1, 0]
    others = [class_sums(contrast, torch.tensor(labels), 5) for contrast, labels, _ in cases]
    holds = torch.tensor([case[2] for case in cases]).double()
    expected = torch.tensor([by_pairs(anchors, LABELS, *case) for case in cases]).double()
    for number, other in enumerate(others):
        squares, pairs = own.squares * holds[number], own.counts.sum() * holds[number]
        found = mean_similarities(own, other, squares, pairs)
        torch.testing.assert_close(torch.stack(found), expected[number])
    # All at once.
    stacked = ClassSums(*(torch.stack(values) for values in zip(*others, strict=True)))
    repeated = ClassSums(*(value.expand(3, *value.shape) for value in own))
    found = mean_similarities(repeated, stacked, own.squares * holds, own.counts.sum() * holds)
    torch.testing.assert_close(torch.stack(found, dim=1), expected)


def test_mean_similarities_without_pairs_are_nan() -> None:
    embeddings = unit(50, 7).float().requires_grad_()
    for labels, has_positive in ((torch.arange(50), False), (torch.full((50,), 3), True)):
        sums = class_sums(embeddings, labels, 50)
        assert not any(value.requires_grad for value in sums)
        positive, negative = mean_similarities(sums, sums, sums.squares, sums.counts.sum())
        assert positive.isnan() != has_positive
        assert negative.isnan() == has_positive
