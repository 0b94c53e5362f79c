"""The choice of pairs, alone and in the InfoNCE. Shape letters: R anchors, C contrast samples."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor

from contrast_d2.contrast import PixelSet, SemiHardPairs, Side, Term, info_nce, terms
from contrast_d2.contrast.kernels import masked

from ..helpers import HostWaits
from . import references
from .test_info_nce import CONTRAST_LABELS, LABELS, unit, with_gradients

# Pools are then the whole of what they come from, and nothing is left to chance.
EVERY = {"max_positives": 1000, "max_negatives": 1000}


def random_pairs(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities and masks; the first anchor has neither positives nor negatives."""
    role = torch.randint(3, (rows, columns))
    role[0] = 2
    return torch.randn(rows, columns), role == 0, role == 1


def pool(similarities: list[float], candidates: list[bool], fraction: float, nearest: bool) -> set:
    """The hardest fraction of one anchor's candidates, by sorting them."""
    order = sorted(
        (i for i, is_candidate in enumerate(candidates) if is_candidate),
        key=lambda i: similarities[i],
        reverse=nearest,
    )
    size = math.floor(fraction * len(order) + 0.5)
    return set(order[: max(size, 1)])


def chosen(mask: Tensor) -> list[set]:
    return [set(row.nonzero().flatten().tolist()) for row in mask]


# ---- semi-hard pairs


@pytest.mark.parametrize("columns", [1, 7, 95])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_pools_are_the_nearest_negatives_and_the_furthest_positives(fraction, columns) -> None:
    similarities, positive, negative = random_pairs(40, columns)
    found = SemiHardPairs(fraction, **EVERY)(similarities, positive, negative)
    for mask, candidates, nearest in (
        (found[0], positive, False),
        (found[1], negative, True),
    ):
        expected = [
            pool(s, c, fraction, nearest)
            for s, c in zip(similarities.tolist(), candidates.tolist(), strict=True)
        ]
        assert chosen(mask) == expected
        assert [bool(row) for row in expected] == candidates.any(dim=1).tolist()


def test_no_more_than_so_many_of_a_pool() -> None:
    similarities, positive, negative = random_pairs(40, 120)
    every = SemiHardPairs(0.5, **EVERY)(similarities, positive, negative)
    some = SemiHardPairs(0.5, max_positives=3, max_negatives=18)(similarities, positive, negative)
    for part, whole, most in (
        (some[0], every[0], 3),
        (some[1], every[1], 18),
    ):
        assert not (part & ~whole).any()
        assert torch.equal(part.sum(1), whole.sum(1).clamp(max=most))
    # Some pools are larger than the bound, and some are not.
    sizes = every[1].sum(1)
    assert (sizes > 18).any() and ((0 < sizes) & (sizes < 18)).any()


def test_every_subset_of_a_pool_is_equally_likely() -> None:
    trials = 3000
    similarities = torch.arange(10.0).expand(trials, -1)
    positive = (torch.arange(10) < 5).expand(trials, -1)
    select = SemiHardPairs(0.8, max_positives=2, max_negatives=3)
    found = select(similarities, positive, ~positive, torch.Generator().manual_seed(0))
    for mask, members, outcomes in (
        (found[0], {0, 1, 2, 3}, 6),
        (found[1], {6, 7, 8, 9}, 4),
    ):
        rows, counts = mask.long().unique(dim=0, return_counts=True)
        assert len(rows) == outcomes
        assert set(rows.nonzero()[:, 1].tolist()) == members
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_the_generator_fixes_the_choice() -> None:
    pairs = random_pairs(20, 100)
    select = SemiHardPairs(1.0, max_positives=5, max_negatives=5)
    first, again, other = (select(*pairs, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[0], other[0])


def test_the_defaults_are_those_of_the_paper() -> None:
    select = SemiHardPairs()
    similarities = torch.randn(1, 60_000)
    positive = torch.arange(60_000)[None] < 20_000
    found = select(similarities, positive, ~positive)
    assert found[0].sum() == 1024 and found[1].sum() == 2048
    assert similarities[found[0]].max() <= similarities[positive].quantile(0.1001)
    assert similarities[found[1]].min() >= similarities[~positive].quantile(0.8999)


def test_the_host_waits_for_nothing() -> None:
    embeddings, labels = unit(len(LABELS), 4, dtype=torch.float32), torch.tensor(LABELS)
    embeddings.requires_grad_()
    with HostWaits() as waits:
        info_nce(embeddings, labels, pairs=SemiHardPairs(max_negatives=2))
    assert waits.calls == []


def test_wrong_arguments_are_named() -> None:
    for arguments in (
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"max_positives": 0},
        {"max_negatives": -1},
    ):
        ((name, value),) = arguments.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            SemiHardPairs(**arguments)


# ---- in the InfoNCE


def chosen_loss(
    anchors: Tensor, contrast: Tensor, positives: list[set], negatives: list[set], temperature
) -> Tensor:
    """The equations over chosen pairs alone."""
    means = []
    for anchor, own_positives, own_negatives in zip(anchors, positives, negatives, strict=True):
        others = [contrast[n] for n in own_negatives]
        pairs = [
            references.pair_loss(anchor, contrast[j], others, temperature) for j in own_positives
        ]
        if pairs:
            means.append(sum(pairs) / len(pairs))
    return sum(means) / len(means)


def semi_hard(anchors: Tensor, contrast: Tensor, contrast_labels: list[int], fraction: float):
    """The pools of each anchor, anchors leading the contrast set."""
    similarities = (anchors @ contrast.T).tolist()
    same = [[0 <= c == label for c in contrast_labels] for label in LABELS]
    for i, row in enumerate(same):
        row[i] = False
    different = [[0 <= c != label for c in contrast_labels] for label in LABELS]
    rows = range(len(LABELS))
    return (
        [pool(similarities[i], same[i], fraction, nearest=False) for i in rows],
        [pool(similarities[i], different[i], fraction, nearest=True) for i in rows],
    )


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
def test_semi_hard_loss_equals_the_equations(fraction: float, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(masked, "_BLOCK_ELEMENTS", rows * 18)
    anchors = unit(len(LABELS), 4).requires_grad_()
    bank = unit(len(CONTRAST_LABELS), 4).requires_grad_()
    contrast, contrast_labels = torch.cat([anchors, bank]), LABELS + CONTRAST_LABELS
    positives, negatives = semi_hard(anchors, contrast, contrast_labels, fraction)
    expected = chosen_loss(anchors, contrast, positives, negatives, 0.1)
    actual = info_nce(
        anchors,
        torch.tensor(LABELS),
        contrast,
        torch.tensor(contrast_labels),
        temperature=0.1,
        anchors_lead_contrast=True,
        pairs=SemiHardPairs(fraction, **EVERY),
    )
    torch.testing.assert_close(
        with_gradients(actual, anchors, bank),
        with_gradients(expected, anchors, bank),
        rtol=1e-9,
        atol=1e-12,
    )


def test_semi_hard_pairs_within_a_batch_equal_the_equations() -> None:
    # fp32, for which there is a faster kernel that knows of no pairs.
    anchors = unit(len(LABELS), 4).requires_grad_()
    positives, negatives = semi_hard(anchors, anchors, LABELS, 0.4)
    expected = chosen_loss(anchors, anchors, positives, negatives, 0.1)
    single = anchors.detach().float().requires_grad_()
    actual = info_nce(single, torch.tensor(LABELS), pairs=SemiHardPairs(0.4, **EVERY))
    torch.testing.assert_close(
        [x.double() for x in with_gradients(actual, single)],
        with_gradients(expected, anchors),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_random_choice_is_the_loss_of_that_choice() -> None:
    anchors, labels = unit(60, 4), torch.arange(60) % 3
    record = []

    def select(similarities: Tensor, positive: Tensor, negative: Tensor):
        pairs = SemiHardPairs(0.5, 2, 4)(similarities, positive, negative)
        record.append(pairs)
        return pairs

    loss = info_nce(anchors, labels, temperature=0.2, pairs=select)
    (pairs,) = record
    assert set(pairs[0].sum(1).tolist()) == {2} and set(pairs[1].sum(1).tolist()) == {4}
    expected = chosen_loss(anchors, anchors, chosen(pairs[0]), chosen(pairs[1]), 0.2)
    torch.testing.assert_close(loss, expected)


def test_random_choices_are_unbiased() -> None:
    # Positives enter the loss linearly: choices of them average to the loss of the whole pool.
    anchors, labels = unit(40, 4), torch.arange(40) % 2
    everything = info_nce(anchors, labels, pairs=SemiHardPairs(0.5, **EVERY))
    select = partial(SemiHardPairs(0.5, 3, 1000), generator=torch.Generator().manual_seed(0))
    losses = torch.stack([info_nce(anchors, labels, pairs=select) for _ in range(400)])
    error = (losses.mean() - everything).abs()
    assert 0 < losses.std() and error < 4 * losses.std() / math.sqrt(len(losses))


@pytest.mark.parametrize("labels", [[], [1], [1, 1, 1], [0, 1, 2], [-1, -1]])
def test_nothing_to_choose_gives_zero(labels: list[int]) -> None:
    anchors = unit(len(labels), 4).requires_grad_()
    loss = info_nce(anchors, torch.tensor(labels, dtype=torch.long), pairs=SemiHardPairs())
    loss.backward()
    assert loss == 0 and not anchors.grad.any()


def test_gradcheck() -> None:
    raw = torch.randn(len(LABELS), 4, dtype=torch.float64, requires_grad=True)

    def loss(raw: Tensor) -> Tensor:
        anchors = torch.nn.functional.normalize(raw, dim=1)
        return info_nce(
            anchors, torch.tensor(LABELS), temperature=0.3, pairs=SemiHardPairs(0.4, **EVERY)
        )

    torch.autograd.gradcheck(loss, (raw,), eps=1e-7)


# ---- pairs by role


def test_roles_equal_the_equations() -> None:
    """Anchors and a bank that serve as positives only, and a set that serves as negatives only."""
    sets = []
    for labels in (LABELS, CONTRAST_LABELS, [0, 2, 3, -1, 1]):
        sets.append(PixelSet(unit(len(labels), 4).requires_grad_(), torch.tensor(labels)))
    anchors, bank, wrong = sets
    sides = [Side(anchors, "positives"), Side(bank, "positives"), Side(wrong, "negatives")]
    everything, classes = (
        torch.cat([x.embeddings for x in sets]),
        torch.cat([x.labels for x in sets]),
    )
    first_wrong = len(LABELS) + len(CONTRAST_LABELS)
    positives = [
        {j for j in range(first_wrong) if classes[j] == label and j != i}
        for i, label in enumerate(LABELS)
    ]
    negatives = [
        {n for n in range(first_wrong, len(classes)) if 0 <= classes[n] != label}
        for label in LABELS
    ]
    expected = 0.5 * chosen_loss(anchors.embeddings, everything, positives, negatives, 0.1)
    output = terms.evaluate([Term("roles", anchors, sides, 0.1, 0.5)], num_classes=5)
    leaves = [x.embeddings for x in sets]
    torch.testing.assert_close(
        with_gradients(output.losses["loss_contrast_roles"], *leaves),
        with_gradients(expected, *leaves),
        rtol=1e-10,
        atol=1e-12,
    )
    assert output.statistics["contrast/roles/negatives"] == 4
