"""Sets of embeddings, summed by class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import (
    ClassSums,
    class_sums,
    mean_similarities,
)

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
