"""Fixed and clustered prototypes against their equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import (
    BalancedSampler,
    Batch,
    ClusteredPrototypes,
    FixedPrototypes,
    MultiScaleProjector,
)
from contrast_d2.contrast.assignment import assign
from contrast_d2.contrast.prototypes import simplex

from ..helpers import run_processes
from . import references

K, WIDTH, CHANNELS = 4, 6, 3


def build(kind: type[FixedPrototypes] | type[ClusteredPrototypes], **options):
    torch.manual_seed(0)
    projector = MultiScaleProjector({"x": CHANNELS}, WIDTH, num_hidden=0)
    # All pixels.
    sampler = BalancedSampler(K, max_anchors=10**6, min_per_class=10**6)
    return kind(projector, sampler, feature="x", **options).double()


def random_batch(seed: int = 0, classes: tuple[int, ...] = (0, 1, 2, 255)):
    generator = torch.Generator().manual_seed(seed)
    features = {"x": torch.randn(2, CHANNELS, 5, 6, generator=generator).double()}
    labels = torch.tensor(classes)[torch.randint(len(classes), (2, 5, 6), generator=generator)]
    scores = torch.randn(2, K, 5, 6, generator=generator).double()
    return features, labels, scores


def pixels_of(method, batch) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings that a method draws, their classes, and whether they are right."""
    seen = Batch(method.projector(batch[0]), *batch[1:], torch.Generator().manual_seed(1))
    (drawn,) = method.sample(seen, ["x"], method.sampler)
    draw = drawn["x"].draw
    right = batch[2].argmax(dim=1).flatten(1)[draw.image, draw.pixel] == draw.labels
    return drawn["x"].embeddings, drawn["x"].labels, right


def loss_of(method, batch) -> Tensor:
    return method(*batch, generator=torch.Generator().manual_seed(1)).losses["loss_contrast_x"]


def assert_same(method, loss: Tensor, expected: Tensor) -> None:
    parameters = list(method.parameters())
    torch.testing.assert_close(
        [loss, *torch.autograd.grad(loss, parameters)],
        [expected, *torch.autograd.grad(expected, parameters)],
    )


# ---- fixed


def test_a_simplex_is_equally_far_in_all_directions() -> None:
    for num_classes, width in ((2, 1), (4, 3), (4, 6), (19, 256), (171, 170)):
        rows = simplex(num_classes, width).double()
        expected = (num_classes * torch.eye(num_classes) - 1) / (num_classes - 1)
        torch.testing.assert_close(rows @ rows.T, expected.double(), atol=1e-6, rtol=0)
        assert rows.sum(dim=0).abs().max() < 1e-5
    with pytest.raises(ValueError, match="8 classes.*6 dimensions.*embed_dim to 7"):
        simplex(8, 6)
    with pytest.raises(ValueError, match="num_classes=1"):
        simplex(1, 6)


def test_fixed_prototypes_are_anchors_of_the_engine() -> None:
    method, batch = build(FixedPrototypes, weight=0.3, temperature=0.5), random_batch()
    rows, labels, _ = pixels_of(method, batch)
    expected = 0.3 * references.cross_loss(
        method.prototypes, list(range(K)), rows, labels.tolist(), 0.5
    )
    assert_same(method, loss_of(method, batch), expected)
    assert not method.prototypes.requires_grad


def test_collapse_onto_fixed_prototypes_is_the_minimum() -> None:
    # With N negatives of each: log(1 + N e^(-(1 + 1/(K-1)) / t)).
    method = build(FixedPrototypes, weight=1.0, temperature=0.5)
    labels = torch.arange(K).repeat(2, 3)[:, None]
    with torch.no_grad():
        head = method.projector.heads["x"][0]
        head.weight.copy_(torch.eye(WIDTH)[:, :CHANNELS, None, None])
        head.bias.zero_()
    features = {"x": simplex(K, CHANNELS).double()[labels[:, 0]].mT[:, :, None]}
    loss = loss_of(method, (features, labels, torch.zeros(2, K, 1, 12).double())).item()
    negatives = 18
    assert loss == pytest.approx(math.log(1 + negatives * math.exp(-(1 + 1 / 3) / 0.5)))


# ---- clustered


def test_clustered_prototypes_are_cross_entropy_and_a_mean_that_moves() -> None:
    method = build(
        ClusteredPrototypes,
        prototypes_per_class=3,
        weight=0.3,
        distance_weight=0.2,
        temperature=0.5,
        momentum=0.9,
    )
    for seed in range(3):
        classes = (0, 1, 2, 255) if seed else (0, 1, 255)  # one comes later
        batch = random_batch(seed, classes)
        rows, labels, right = pixels_of(method, batch)
        before = method.prototypes.clone()
        loss = loss_of(method, batch)
        for c in range(K):  # pixels begin a class
            if (labels == c).any() and not before[c].any():
                of_class = rows[labels == c].detach()
                before[c] = of_class[torch.arange(3) * len(of_class) // 3]
        ids = torch.zeros_like(labels)
        for c in range(K):
            of_class = labels == c
            logits = rows[of_class].detach() @ before[c].T / 0.05
            counts = [int(of_class.sum())]
            if counts[0]:
                ids[of_class] = 3 * c + assign(logits, counts, 3)
        flat = before.flatten(0, 1)
        logits = (rows @ flat.T / 0.5).masked_fill(~flat.any(dim=1), -torch.inf)
        distances = 1 - (rows * flat[ids]).sum(dim=1)
        expected = 0.3 * F.cross_entropy(logits, ids) + 0.2 * distances.square().mean()
        assert_same(method, loss, expected)
        for number in range(3 * K):
            chosen = rows[right & (ids == number)].detach()
            if len(chosen):
                mean = F.normalize(chosen.sum(dim=0), dim=0)
                moved = F.normalize(0.9 * flat[number] + 0.1 * mean, dim=0)
            else:
                moved = flat[number]
            torch.testing.assert_close(method.prototypes.flatten(0, 1)[number], moved)
    assert not method.prototypes[3].any()  # never seen


def test_a_class_that_is_missing_keeps_its_prototypes() -> None:
    method = build(ClusteredPrototypes, prototypes_per_class=2, momentum=0.5)
    loss_of(method, random_batch(0))
    kept = method.prototypes[2].clone()
    for seed in range(1, 4):
        loss_of(method, random_batch(seed, (0, 1, 255)))
    assert torch.equal(method.prototypes[2], kept) and kept.any()
    # Wrong pixels move none.
    features, labels, _ = random_batch(5)
    before = method.prototypes.clone()
    wrong = -F.one_hot(labels.clamp(max=K - 1), K).movedim(3, 1).double()
    loss_of(method, (features, labels, wrong))
    assert torch.equal(method.prototypes, before)


def test_one_prototype_is_a_moving_mean() -> None:
    method = build(ClusteredPrototypes, prototypes_per_class=1, momentum=0.5)
    features = {"x": torch.randn(CHANNELS).double()[None, :, None, None].expand(2, -1, 5, 6)}
    labels = torch.zeros(2, 5, 6, dtype=torch.long)
    scores = F.one_hot(labels, K).movedim(3, 1).double()
    loss_of(method, (features, labels, scores))
    (row, *_), _, _ = pixels_of(method, (features, labels, scores))
    torch.testing.assert_close(method.prototypes[0, 0], row.detach())


def step_of_rank() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prototypes after a rank's own batch; and its pixels, their classes, and which are right."""
    method = build(ClusteredPrototypes, prototypes_per_class=1, momentum=0.0)
    batch = random_batch(dist.get_rank(), (0, 1, 255) if dist.get_rank() == 0 else (0, 2, 255))
    loss_of(method, batch)
    rows, labels, right = pixels_of(method, batch)
    return method.prototypes, rows.detach(), labels, right


def test_the_pixels_of_all_processes_move_the_prototypes() -> None:
    ranks = run_processes(step_of_rank, 2)
    assert torch.equal(ranks[0][0], ranks[1][0])
    rows, labels, right = (torch.cat(part) for part in list(zip(*ranks, strict=True))[1:])
    for c in range(3):  # the first process has no pixel of class 2
        mean = F.normalize(rows[right & (labels == c)].sum(dim=0), dim=0)
        torch.testing.assert_close(ranks[0][0][c, 0], mean)
    assert not ranks[0][0][3].any()


def test_shares_are_equal_and_the_assignment_is_the_best() -> None:
    torch.manual_seed(0)
    logits = 20 * torch.randn(60, 3).double()
    counts = [20, 0, 40]
    found = assign(logits, counts, 500)
    for part, number in zip(found.split(counts), counts, strict=True):
        shares = part.bincount(minlength=3)
        assert number == 0 or (shares - number / 3).abs().max() < 2
    # Invariant to what is added to all similarities of a class, and sharp where it is large.
    torch.testing.assert_close(assign(logits + 100, counts, 500), found)
    for _ in range(20):
        logits = torch.randn(3, 3).double()
        pairs = itertools.permutations(range(3))
        best = max(pairs, key=lambda p: sum(logits[i, p[i]] for i in range(3)).item())
        assert assign(logits * 200, [3], 2000).tolist() == list(best)
    # Far beyond what an exponential could hold.
    assert assign(torch.tensor([[1e4, 0.0], [0.0, 1e4]]), [2], 3).tolist() == [0, 1]


def test_fewer_pixels_than_prototypes_take_the_nearest() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0], [0.0, 9.0, 8.0]])
    assert assign(logits, [2], 3).tolist() == [1, 1]
    assert assign(torch.zeros(0, 3), [0, 0], 3).tolist() == []


def test_the_order_of_pixels_and_prototypes_does_not_matter() -> None:
    torch.manual_seed(1)
    logits = torch.randn(12, 4).double()
    rows, columns = torch.randperm(12), torch.randperm(4)
    found = assign(logits, [12], 5)
    assert torch.equal(columns[assign(logits[rows][:, columns], [12], 5)], found[rows])


def test_wrong_arguments_are_named() -> None:
    for kind, options, message in (
        (FixedPrototypes, {"weight": 0}, "weight=0"),
        (FixedPrototypes, {"temperature": -1}, "temperature=-1"),
        (ClusteredPrototypes, {"momentum": 1}, "momentum=1"),
        (ClusteredPrototypes, {"distance_weight": -1}, "distance_weight=-1"),
        (ClusteredPrototypes, {"prototypes_per_class": 0}, "prototypes_per_class=0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(kind, **options)
