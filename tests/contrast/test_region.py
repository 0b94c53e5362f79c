"""Region contrast against its equations. Shape letters: B images, K classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from contrast_d2.contrast import MemoryBank, MultiScaleProjector, RegionContrast
from contrast_d2.contrast.region import Centres

from . import references

K, WIDTH, CHANNELS = 4, 5, 3


def build(centres: Centres = "dynamic", slots: int = 3, **options) -> RegionContrast:
    torch.manual_seed(0)
    projector = MultiScaleProjector({"x": CHANNELS}, WIDTH, num_hidden=0)
    memory = MemoryBank(K, WIDTH, regions_per_class=slots, pixels_per_class=0)
    return RegionContrast(projector, K, memory, feature="x", centres=centres, **options).double()


def random_batch(seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Maps, labels and scores of one size; class 3 is in one image of the first batch alone."""
    generator = torch.Generator().manual_seed(seed)
    features = {"x": torch.randn(2, CHANNELS, 5, 6, generator=generator).double()}
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(4, (2, 5, 6), generator=generator)]
    if seed == 0:
        labels[1, 0, :3] = 3
    return features, labels, 2 * torch.randn(2, K, 5, 6, generator=generator).double()


def loop_centres(
    method: RegionContrast, batch: tuple[dict[str, Tensor], Tensor, Tensor]
) -> tuple[list[Tensor], list[int]]:
    """Centres of all images and classes, and their classes, pixel by pixel."""
    (features, labels, scores), centres, classes = batch, [], []
    embeddings = method.projector(features)["x"]
    for image in range(len(labels)):
        for c in range(K):
            total = embeddings.new_zeros(WIDTH)
            pixels = (labels[image] == c).nonzero().tolist()
            for i, j in pixels:
                probabilities = scores[image, :, i, j].softmax(dim=0)
                easy = method.centres == "dynamic" and probabilities.argmax() == c
                weight = max(1 - probabilities.max().item(), 1e-4) if easy else 1.0
                total = total + weight * embeddings[image, :, i, j]
            if pixels:
                centres.append(total / total.norm())
                classes.append(c)
    return centres, classes


@pytest.mark.parametrize("centres", ["dynamic", "labels"])
def test_losses_gradients_and_memory_are_those_of_loops(centres: Centres) -> None:
    method = build(centres, weight=0.3)
    stored: list[list[Tensor]] = [[] for _ in range(K)]
    for seed in range(3):
        batch = random_batch(seed)
        anchors, classes = loop_centres(method, batch)
        keys = [(key, c) for c in range(K) for key in stored[c]]
        loss = method(*batch).losses["loss_contrast_x"]
        if keys:
            expected = 0.3 * references.cross_loss(
                torch.stack(anchors),
                classes,
                torch.stack([key for key, _ in keys]),
                [c for _, c in keys],
                0.2,
            )
            parameters = list(method.parameters())
            torch.testing.assert_close(
                [loss, *torch.autograd.grad(loss, parameters)],
                [expected, *torch.autograd.grad(expected, parameters)],
            )
        else:
            assert loss == 0 and seed == 0
        for anchor, c in zip(anchors, classes, strict=True):
            stored[c] = [*stored[c], anchor.detach()][-3:]
        contrast = method.memory.contrast_set()
        for c in range(K):
            assert len(stored[c]) == (contrast.labels == c).sum()
            for key in stored[c]:
                assert (contrast.embeddings[contrast.labels == c] - key).norm(dim=1).min() < 1e-12


def test_dynamic_centres_follow_what_is_hard() -> None:
    features, labels, _ = random_batch(1)
    labels = torch.where(labels == 255, 0, labels)
    truth = torch.nn.functional.one_hot(labels, K).movedim(3, 1).double()
    plain = build("labels")
    plain(features, labels, truth)
    expected = plain.memory.keys
    for scores in (3 * truth, -3 * truth):  # alike for all pixels
        method = build("dynamic")
        method(features, labels, scores)
        torch.testing.assert_close(method.memory.keys, expected)
    # One wrong pixel of class 0, others right with probability c: F_wrong + (1 - c) sum F_right.
    image, row, column = (labels == 0).nonzero()[0].tolist()
    scores = 3 * truth
    scores[image, :, row, column] = torch.tensor([0.0, 3.0, 0.0, 0.0])
    method = build("dynamic")
    embeddings = method.projector(features)["x"].detach()
    method(features, labels, scores)
    doubt = 1 - math.exp(3) / (math.exp(3) + K - 1)
    wrong = embeddings[image, :, row, column]
    every = embeddings[image][:, labels[image] == 0].sum(dim=1)
    centre = normalize(wrong + doubt * (every - wrong), dim=0)
    assert (method.memory.keys - centre).norm(dim=1).min() < 1e-12


def test_pixels_that_are_surely_right_have_a_centre() -> None:
    features, labels, _ = random_batch(1)
    sure = 1e4 * torch.nn.functional.one_hot(labels.clamp(max=K - 1), K).movedim(3, 1).double()
    method, plain = build("dynamic"), build("labels")
    for each in (method, plain):
        each(features, labels, sure)
    torch.testing.assert_close(method.memory.keys, plain.memory.keys)


def test_scale_and_ignored_pixels_do_not_matter() -> None:
    changed = [x for x in random_batch(1)[:1]][0]["x"].clone()
    labels = random_batch(1)[1]
    changed[:, :] = torch.where((labels == 255)[:, None], 1e6, 7 * changed)
    losses = []
    for features in (random_batch(1)[0], {"x": changed}):
        method = build()
        with torch.no_grad():
            method.projector.heads["x"][0].bias.zero_()
        method(*random_batch(0))
        losses.append(method(features, *random_batch(1)[1:]).losses["loss_contrast_x"])
    torch.testing.assert_close(*losses)


def test_a_class_without_direction_is_absent() -> None:
    features, labels, scores = random_batch(1)
    method = build()
    with torch.no_grad():
        method.projector.heads["x"][0].bias.zero_()
    features["x"][:, :, :] = torch.where((labels == 1)[:, None], 0, features["x"])
    method(features, labels, scores)
    assert not (method.memory.contrast_set().labels == 1).any()
    output = method(features, labels, scores)
    gradient = torch.autograd.grad(sum(output.losses.values()), list(method.parameters()))
    assert all(x.isfinite().all() for x in gradient)


def test_the_floor_of_a_memory_that_has_collapsed() -> None:
    # Orthogonal classes of M keys: log(1 + (K - 1) M e^(-1 / t)).
    method = build("labels", slots=7)
    with torch.no_grad():
        method.projector.heads["x"][0].weight.copy_(torch.eye(WIDTH)[:, :CHANNELS, None, None])
        method.projector.heads["x"][0].bias.zero_()
    labels = torch.arange(3).repeat(2, 1)[:, None]
    features = {"x": normalize(torch.eye(3)[labels[:, 0]].mT[:, :, None], dim=1).double()}
    scores = torch.zeros(2, K, 1, 3).double()
    for _ in range(4):
        method(features, labels, scores)
    loss = method(features, labels, scores).losses["loss_contrast_x"].item()
    assert loss == pytest.approx(math.log(1 + 2 * 7 * math.exp(-1 / 0.2)))


def test_wrong_arguments_are_named() -> None:
    projector = MultiScaleProjector({"x": CHANNELS}, WIDTH, num_hidden=0)
    pixels = MemoryBank(K, WIDTH, regions_per_class=3, pixels_per_class=10)
    other = MemoryBank(K + 1, WIDTH, regions_per_class=3, pixels_per_class=0)
    correct = MemoryBank(K, WIDTH, regions_per_class=3, pixels_per_class=0, admission="correct")
    for memory, message in (
        (pixels, "pixels_per_class=10"),
        (correct, "admission='correct'"),
        (other, "num_classes=5"),
    ):
        with pytest.raises(ValueError, match=message):
            RegionContrast(projector, K, memory, feature="x")
    for options, message in (
        ({"centres": "mean"}, "centres='mean'.*dynamic"),
        ({"weight": 0}, "weight=0"),
        ({"temperature": 0}, "temperature=0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
