"""Sets of embeddings: read off maps, summed by class, collected over processes.

Shape letters: N rows, D embedding width.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import (
    ClassSums,
    PixelSet,
    class_sums,
    gather_embeddings,
    gather_pixels,
    mean_similarities,
    sets,
)

from ..helpers import run_processes

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
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            drawn = gather_pixels(maps, IMAGE, PIXEL, distinct=True)
        assert sizes == [len(IMAGE)] * 2
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


# ---- two processes

ROWS = {"more and less": [3, 1], "one has none": [0, 2], "all have none": [0, 0]}


def own_rows(count: int, rank: int) -> tuple[Tensor, Tensor]:
    values = 10 * rank + torch.arange(4 * count, dtype=torch.float64).view(count, 4)
    return values.requires_grad_(), torch.arange(count) + 10 * rank


def run_rank() -> dict[str, dict[str, Tensor]]:
    rank, found = dist.get_rank(), {}
    for case, counts in ROWS.items():
        rows, labels = own_rows(counts[rank], rank)
        (parts, label_parts) = sets.gather_parts(rows, labels)
        every = sets.gathered_set(PixelSet(rows, labels))
        stack = sets.stack_processes(rows.sum(dim=0))
        # Each process weighs the rows of all by another factor.
        weighted = sum(number * part.sum() for number, part in enumerate(parts, start=1))
        loss = (rank + 1) * (weighted + every.embeddings.sum() + stack[0].sum())
        (gradient,) = torch.autograd.grad(loss, rows)
        values = {"parts": torch.cat(parts), "labels": torch.cat(label_parts), "stack": stack}
        values.update(set=every.embeddings, set_labels=every.labels, gradient=gradient)
        found[case] = {name: value.detach() for name, value in values.items()}
    return found


def test_rows_of_processes_and_their_gradients() -> None:
    ranks = run_processes(run_rank, 2)
    for case, counts in ROWS.items():
        rows, labels = zip(*(own_rows(n, rank) for rank, n in enumerate(counts)), strict=True)
        for rank, results in enumerate(ranks):
            order = (rank, 1 - rank)  # a set begins with its own rows
            # Both processes' factors, 1 and 2, times the row's weight in its parts, the set, and
            # for the first process the stack.
            gradient = torch.full_like(rows[rank], 3 * ((rank + 1) + 1 + (rank == 0)))
            expected = {
                "parts": torch.cat(rows),
                "labels": torch.cat(labels),
                "set": torch.cat([rows[i] for i in order]),
                "set_labels": torch.cat([labels[i] for i in order]),
                "stack": torch.stack([x.sum(dim=0) for x in rows]),
                "gradient": gradient,
            }
            expected = {name: value.detach() for name, value in expected.items()}
            torch.testing.assert_close(results[case], expected, rtol=0, atol=0, msg=case)
