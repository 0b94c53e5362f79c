"""Triplets along a class tree against their equation."""

from __future__ import annotations

import pytest
import torch

from contrast_d2.contrast import (
    BalancedSampler,
    Batch,
    MultiScaleProjector,
    TreeTriplets,
)
from contrast_d2.contrast.tree import draw_triplets

K, WIDTH, CHANNELS = 5, 6, 3
GROUPS = {"a": [0, 3], "b": [1, 2], "c": [4]}


def build(groups=GROUPS, **options) -> TreeTriplets:
    torch.manual_seed(0)
    projector = MultiScaleProjector({"x": CHANNELS}, WIDTH, num_hidden=0)
    sampler = BalancedSampler(K, max_anchors=200, min_per_class=12)
    return TreeTriplets(projector, sampler, groups, feature="x", **options).double()


def random_batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = {"x": torch.randn(2, CHANNELS, 9, 9, generator=generator).double()}
    labels = torch.tensor([0, 1, 2, 3, 4, 255])[torch.randint(6, (2, 9, 9), generator=generator)]
    return features, labels


def test_loss_and_gradient_are_those_of_a_loop() -> None:
    method, batch = build(margin=0.6, weight=0.5), random_batch()
    generator = torch.Generator().manual_seed(1)
    seen = Batch(method.projector(batch[0]), batch[1], None, generator)
    (drawn,) = method.sample(seen, ["x"], method.sampler)
    rows, counts = drawn["x"].embeddings, drawn["x"].class_counts
    triplets = draw_triplets(counts, method.parents, generator).T.tolist()
    terms = [
        (0.6 + (1 - rows[a] @ rows[s]) - (1 - rows[a] @ rows[o])).clamp(min=0)
        for a, s, o in triplets
    ]
    expected = 0.5 * sum(terms) / len(terms)
    before = batch[1].clone()
    output = method(*batch, generator=torch.Generator().manual_seed(1))
    loss, parameters = output.losses["loss_contrast_x"], list(method.parameters())
    torch.testing.assert_close(
        [loss, *torch.autograd.grad(loss, parameters)],
        [expected, *torch.autograd.grad(expected, parameters)],
    )
    assert torch.equal(batch[1], before)
    assert output.statistics["contrast/x/anchors"] == len(triplets)


def test_partners_are_of_the_right_branches_and_every_one_is_drawn() -> None:
    parents, counts = [0, 1, 1, 0, 2], (3, 2, 0, 4, 1)
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    found: dict[int, tuple[set[int], set[int]]] = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        for a, s, o in draw_triplets(counts, parents, generator).T.tolist():
            near, far = found.setdefault(a, (set(), set()))
            near.add(s)
            far.add(o)
    group = [parents[c] for c in labels]
    rows = range(len(labels))
    for a in rows:
        near = {r for r in rows if group[r] == group[a] and labels[r] != labels[a]}
        far = {r for r in rows if group[r] != group[a]}
        # Classes 1 (its sibling is not drawn) and 4 (it has none) are no anchors.
        assert found.get(a, (set(), set())) == ((near, far) if near else (set(), set()))
    assert labels[5] == 3 and found[5] == ({0, 1, 2}, {3, 4, 9})


def test_where_there_is_no_triplet_there_is_no_loss() -> None:
    features, labels = random_batch()
    for kept in ((0, 3), (0, 1, 4), (4,), ()):
        only = torch.where(torch.isin(labels, torch.tensor(kept)), labels, 255)
        assert build()(features, only).losses["loss_contrast_x"] == 0, kept


def test_siblings_that_are_near_enough_cost_nothing() -> None:
    method = build(margin=0.6)
    with torch.no_grad():
        head = method.projector.heads["x"][0]
        head.weight.copy_(torch.eye(WIDTH)[:, :CHANNELS, None, None])
        head.bias.zero_()
    labels = random_batch()[1]
    group = torch.tensor([0, 1, 1, 0, 2])[labels.clamp(max=K - 1)]
    features = {"x": torch.eye(3)[group].movedim(3, 1).double()}
    assert method(features, labels).losses["loss_contrast_x"] == 0
    # And all at one point cost the margin.
    features = {"x": torch.ones(2, 3, 9, 9).double()}
    loss = method(features, labels).losses["loss_contrast_x"].item()
    assert loss == pytest.approx(0.5 * 0.6)


def test_overlapping_groups_give_a_class_to_the_first() -> None:
    assert build({**GROUPS, "rare": [3, 4]}).parents == [0, 1, 1, 0, 2]


def test_trees_that_are_none_are_refused() -> None:
    for groups, message in (
        ({"a": [0, 3], "b": [1, 2]}, "class 4 is in none"),
        ({**GROUPS, "d": [7]}, "class 7 does not exist"),
        ({"a": [0, 1, 2, 3, 4]}, "several groups"),
        ({str(c): [c] for c in range(K)}, "several groups"),
        ({}, "class 0 is in none"),
    ):
        with pytest.raises(ValueError, match=message):
            build(groups)
    for options, message in (({"margin": 0}, "margin=0"), ({"weight": -1}, "weight=-1")):
        with pytest.raises(ValueError, match=message):
            build(**options)
