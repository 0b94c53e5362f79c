"""Similarity statistics against sums over all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from contrast_d2.contrast import class_sums, similarity_statistics
from contrast_d2.contrast.statistics import stack_class_sums

# Class 3 has one anchor and class 1 no contrast sample; negative labels do not count.
LABELS = [0, 2, 0, 1, -1, 1, 2, 0, 3, 1, 0, -1]
CONTRAST_LABELS = [2, -1, 0, 0, 4, 2, 3, -7]


def unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def expected(anchors: Tensor, labels: list[int], contrast: Tensor, others: list[int], self_: bool):
    """Mean similarity of positive and negative pairs; `self_` says that sample i is anchor i."""
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for i, label in enumerate(labels):
        for j, other in enumerate(others):
            if label >= 0 and other >= 0 and not (self_ and i == j):
                pairs[label == other].append(torch.dot(anchors[i], contrast[j]).item())
    return [pytest.approx(sum(pairs[same]) / len(pairs[same])) for same in (True, False)]


def test_within_a_set() -> None:
    anchors = unit(len(LABELS), 6)
    sums = class_sums(anchors, torch.tensor(LABELS), 5)
    found = similarity_statistics(sums, sums, contrast_holds_anchors=True)
    assert [v.item() for v in found] == expected(anchors, LABELS, anchors, LABELS, True)


def test_across_sets() -> None:
    anchors, contrast = unit(len(LABELS), 6), unit(len(CONTRAST_LABELS), 6)
    found = similarity_statistics(
        class_sums(anchors, torch.tensor(LABELS), 5),
        class_sums(contrast, torch.tensor(CONTRAST_LABELS), 5),
    )
    assert [v.item() for v in found] == expected(anchors, LABELS, contrast, CONTRAST_LABELS, False)


def test_anchors_of_a_larger_set() -> None:
    anchors, more = unit(len(LABELS), 6), unit(len(CONTRAST_LABELS), 6)
    everything, labels = torch.cat([anchors, more]), LABELS + CONTRAST_LABELS
    found = similarity_statistics(
        class_sums(anchors, torch.tensor(LABELS), 5),
        class_sums(everything, torch.tensor(labels), 5),
        contrast_holds_anchors=True,
    )
    assert [v.item() for v in found] == expected(anchors, LABELS, everything, labels, True)


@pytest.mark.parametrize("within", [False, True])
def test_stacked_sets_give_what_each_gives(within: bool) -> None:
    sets = [class_sums(unit(12, 6), torch.randint(-1, 5, (12,)), 5) for _ in range(6)]
    options = {"contrast_holds_anchors": within}
    stacked = similarity_statistics(
        stack_class_sums(sets[:3]), stack_class_sums(sets[3:]), **options
    )
    for number in range(3):
        alone = similarity_statistics(sets[number], sets[3 + number], **options)
        torch.testing.assert_close([x[number] for x in stacked], list(alone), equal_nan=True)


def test_without_pairs_they_are_nan() -> None:
    embeddings = unit(50, 7).float()
    for labels, has_positive in ((torch.arange(50), False), (torch.full((50,), 3), True)):
        sums = class_sums(embeddings, labels, 50)
        found = similarity_statistics(sums, sums, contrast_holds_anchors=True)
        assert found.positive.isnan() != has_positive
        assert found.negative.isnan() == has_positive


def test_counts_and_no_graph() -> None:
    embeddings = unit(len(LABELS), 3).requires_grad_()
    sums = class_sums(embeddings, torch.tensor(LABELS, dtype=torch.int32), 6)
    assert sums.counts.tolist() == [4, 3, 2, 1, 0, 0]
    assert sums.squares.item() == pytest.approx(10)
    assert not any(value.requires_grad for value in sums)
