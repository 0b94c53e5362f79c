"""What an inspection holds of a step, against loops over the pixels in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contrast_d2.contrast import (
    PNE,
    BalancedSampler,
    BoundaryNegatives,
    Contextrast,
    ContrastMethod,
    ContrastSum,
    HardAnchorSampler,
    Inspection,
    MemoryBank,
    MultiScaleContrast,
    MultiScaleProjector,
    PixelContrast,
    PixelSet,
    Side,
    Term,
    downsample_labels,
)
from contrast_d2.contrast import inspection as module
from contrast_d2.contrast.inspection import DrawnPixels, evenly_spread

from ..helpers import run_processes

CLASSES, CHANNELS, WIDTH = 4, {"res2": 6, "res3": 8}, 5


def projector(*names: str) -> MultiScaleProjector:
    return MultiScaleProjector({name: CHANNELS[name] for name in names}, WIDTH, num_hidden=0)


def multi_scale(**options: Any) -> MultiScaleContrast:
    sampler = BalancedSampler(CLASSES, max_anchors=60)
    weights = dict.fromkeys(CHANNELS, 1.0)
    cross = [("res2", "res3", 1.0)]
    return MultiScaleContrast(
        projector(*CHANNELS), sampler, scale_weights=weights, cross_scale=cross, **options
    )


def pixel(**options: Any) -> PixelContrast:
    sampler = HardAnchorSampler(CLASSES, max_per_group=8)
    return PixelContrast(projector("res2"), sampler, feature="res2", **options)


def bank() -> MemoryBank:
    return MemoryBank(CLASSES, WIDTH, regions_per_class=8, pixels_per_class=16, pixels_per_image=3)


def pne(**options: Any) -> PNE:
    everything = {"samples_per_group": 1000, "max_hard": 1.0, **options}
    return PNE(projector("res2"), CLASSES, feature="res2", **everything)


def contextrast() -> Contextrast:
    return Contextrast(projector("res3"), CLASSES, layers={"res3": 1.0})


METHODS = {
    "multi_scale": multi_scale,
    "boundary": lambda: multi_scale(negatives=BoundaryNegatives(CLASSES)),
    "pixel": pixel,
}


def random_batch(height: int = 30, width: int = 40) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Two images of which the maps do not divide the size; some pixels are ignored."""
    sizes = {"res2": (8, 10), "res3": (4, 5)}
    features = {name: torch.randn(2, CHANNELS[name], *sizes[name]) for name in sizes}
    labels = torch.tensor([0, 1, 2, 3, 255])[torch.randint(5, (2, height // 5, width // 5))]
    labels = labels.repeat_interleave(5, 1).repeat_interleave(5, 2)
    return features, labels, torch.randn(2, CLASSES, 8, 10)


def inspected(contrast: nn.Module, batch: tuple, seed: int = 1) -> Inspection:
    contrast.inspection = Inspection(CLASSES)
    contrast(*batch, generator=torch.Generator().manual_seed(seed))
    return contrast.inspection


def units(contrast: ContrastMethod, batch: tuple, name: str) -> Tensor:
    """(B, h, w, D) fp64 unit embeddings of a map."""
    x = contrast.projector(batch[0])[name].detach().double().movedim(1, -1)
    return x / x.norm(dim=-1, keepdim=True)


def rows_of(draw: DrawnPixels, embeddings: Tensor, labels: Tensor) -> list[Tensor]:
    """Embeddings of drawn pixels, found by the place in the labels that they read."""
    (h, w), (height, width) = embeddings.shape[1:3], labels.shape[1:]
    places = {(i * height // h, j * width // w): (i, j) for i in range(h) for j in range(w)}
    return [
        embeddings[(b, *places[row, column])]
        for b, row, column in zip(*(x.tolist() for x in draw[:3]), strict=True)
    ]


def check(found: module.Similarities, pairs: Iterable[tuple[int, int, float, bool]]) -> None:
    """Compares with (anchor's class, sample's class, cosine, whether a positive) of all pairs."""
    pairs = list(pairs)
    for values, sign in ((found.positive, True), (found.negative, False)):
        expected = torch.tensor([c for _, _, c, p in pairs if p == sign], dtype=torch.float64)
        assert len(expected) > 5
        torch.testing.assert_close(
            values.double().sort().values, expected.sort().values, rtol=0, atol=2e-6
        )
    for i in range(CLASSES):
        for j in range(CLASSES):
            cosines = [c for a, b, c, _ in pairs if (a, b) == (i, j)]
            mean = sum(cosines) / len(cosines) if cosines else math.nan
            assert found.of_classes[i, j].item() == pytest.approx(mean, abs=2e-6, nan_ok=True)


@pytest.mark.parametrize("name", ["multi_scale", "boundary"])
def test_pairs_of_multi_scale_contrast(name: str) -> None:
    contrast, batch = METHODS[name](), random_batch()
    found = inspected(contrast, batch)
    assert list(found.similarities) == ["res2", "res3", "res2_res3"]
    rows = {
        (scale, role): list(
            zip(
                rows_of(draw, units(contrast, batch, scale), batch[1]),
                draw.labels.tolist(),
                strict=True,
            )
        )
        for scale, draws in found.draws.items()
        for role, draw in draws.items()
    }
    for term, (source, target) in {
        "res2": ("res2", "res2"),
        "res3": ("res3", "res3"),
        "res2_res3": ("res2", "res3"),
    }.items():
        anchors, positives = rows[source, "anchors"], rows[target, "anchors"]
        negatives = rows.get((target, "boundary negatives"), positives)
        same = [
            (a, b, float(x @ y), True)
            for n, (x, a) in enumerate(anchors)
            for m, (y, b) in enumerate(positives)
            if a == b and (source != target or n != m)
        ]
        other = [(a, b, float(x @ y), False) for x, a in anchors for y, b in negatives if a != b]
        check(found.similarities[term], same + other)


def test_pairs_with_a_memory() -> None:
    contrast, batch = pixel(memory=bank()), random_batch()
    inspected(contrast, batch)  # fills the bank
    keys, key_labels, *_ = contrast.memory.contrast_set()
    known = [(x.double(), k) for x, k in zip(keys.clone(), key_labels.tolist(), strict=True)]
    filled = contrast.memory.filled.clone()
    found = inspected(contrast, batch, seed=2)
    draw = found.draws["res2"]["anchors"]
    anchors = rows_of(draw, units(contrast, batch, "res2"), batch[1])
    check(
        found.similarities["res2"],
        [
            (a, b, float(x @ y), a == b)
            for i, (x, a) in enumerate(zip(anchors, draw.labels.tolist(), strict=True))
            for j, (y, b) in enumerate([*zip(anchors, draw.labels.tolist(), strict=True), *known])
            if b >= 0 and i != j
        ],
    )
    # As it was when the step contrasted with it: two regions of 8, and pixels of 16.
    regions, pixels = filled.split(CLASSES)
    assert regions.max() == 2 and pixels.max() == 6
    assert set(found.bank_fill) == {"regions", "pixels"}
    torch.testing.assert_close(found.bank_fill["regions"], regions / 8)
    torch.testing.assert_close(found.bank_fill["pixels"], pixels / 16)


def test_a_bank_without_regions_has_one_ring() -> None:
    memory = MemoryBank(CLASSES, WIDTH, regions_per_class=0, pixels_per_class=20)
    assert list(memory.fill_by_class()) == ["pixels"]


def test_pairs_of_contextrast() -> None:
    contrast, batch = contextrast(), random_batch()
    found = inspected(contrast, batch)
    embeddings, labels = units(contrast, batch, "res3"), downsample_labels(batch[1], (4, 5))
    means = [embeddings[labels == k].mean(dim=0) for k in range(CLASSES)]
    counts = [int((labels == k).sum()) for k in range(CLASSES)]
    assert found.anchor_pixels["res3"].tolist() == counts
    draw = found.draws["res3"]["boundary negatives"]
    negatives = rows_of(draw, embeddings, batch[1])
    pairs = []
    for a, mean in enumerate(means):
        anchor = mean / mean.norm()
        pairs += [(a, a, float(anchor @ x), True) for x in embeddings[labels == a]]
        pairs += [
            (a, b, float(anchor @ x), False)
            for x, b in zip(negatives, draw.labels.tolist(), strict=True)
            if a != b
        ]
    check(found.similarities["res3"], pairs)


def test_pairs_of_pne() -> None:
    contrast, batch = pne(), random_batch()
    # In the second image no pixel of class 3 is right: anchors stand in for its negatives.
    label_map = downsample_labels(batch[1], (8, 10))
    batch[2][1, 3][label_map[1] == 3] = -10
    found = inspected(contrast, batch)
    embeddings, labels = units(contrast, batch, "res2").flatten(1, 2), label_map.flatten(1)
    predictions = batch[2].argmax(dim=1).flatten(1)
    pairs, anchors, samples = [], 0, set()
    for b in range(2):
        of = {
            (j, k): ((predictions[b] == j) & (labels[b] == k)).nonzero()[:, 0].tolist()
            for j in range(CLASSES)
            for k in range(CLASSES)
        }
        for (j, k), group in of.items():
            shown = any(of[other, j] for other in range(CLASSES))
            if j == k or not group or not of[k, k] or not shown:
                continue
            anchors += len(group)
            samples |= {(b, n) for n in of[k, k] + of[j, j]}
            for a in group:
                x = embeddings[b, a]
                pairs += [(k, k, float(x @ embeddings[b, n]), True) for n in of[k, k]]
                pairs += [
                    (k, int(labels[b, n]), float(x @ embeddings[b, n]), False)
                    for n in of[j, j] or group
                ]
    check(found.similarities["res2"], pairs)
    draws = found.draws["res2"]
    assert len(draws["anchors"].image) == anchors and draws["anchors"].wrong.all()
    assert len(draws["samples"].image) == len(samples) and not draws["samples"].wrong.any()


@pytest.mark.parametrize("name", ["multi_scale", "pixel"])
def test_draws_are_where_the_labels_say(name: str) -> None:
    contrast, batch = METHODS[name](), random_batch()
    draw = inspected(contrast, batch).draws["res2"]["anchors"]
    assert len(draw.image) > 10
    assert torch.equal(batch[1][draw.image, draw.row, draw.column], draw.labels)
    assert set(draw.row.tolist()) <= {i * 30 // 8 for i in range(8)}
    predictions = batch[2].argmax(dim=1)
    rows = {i * 30 // 8: i for i in range(8)}
    for b, row, column, label, wrong in zip(*(x.tolist() for x in draw), strict=True):
        assert wrong == (predictions[b, rows[row], column // 4] != label)
    assert 0 < draw.wrong.sum() < len(draw.wrong)


def test_a_sum_names_what_its_methods_add() -> None:
    total, batch = ContrastSum({"ms": multi_scale(), "px": pixel(memory=bank())}), random_batch()
    found = inspected(total, batch)
    assert list(found.similarities) == ["ms/res2", "ms/res3", "ms/res2_res3", "px/res2"]
    assert list(found.draws) == ["ms/res2", "ms/res3", "px/res2"]
    assert list(found.bank_fill) == ["px/regions", "px/pixels"]
    assert found.labels is batch[1]


def test_a_step_without_contrast_shows_the_bank_alone() -> None:
    contrast = pixel(memory=bank(), warmup_iters=5)
    found = inspected(contrast, random_batch())
    assert set(found.bank_fill) == {"regions", "pixels"}
    assert not found.draws and not found.similarities


def test_nothing_to_draw() -> None:
    for build in (*METHODS.values(), contextrast, pne):
        features, labels, scores = random_batch()
        found = inspected(build(), (features, torch.full_like(labels, 255), scores))
        for draws in found.draws.values():
            assert all(len(draw.image) == 0 for draw in draws.values())
        for similarities in found.similarities.values():
            assert similarities.of_classes.isnan().all()


def test_large_sets_are_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    valid = torch.arange(1000) % 10 != 0
    index = evenly_spread(valid, 90)
    assert len(index) == 90 and valid[index].all()
    assert index.diff().min() >= 10 and index.diff().max() <= 12
    assert torch.equal(evenly_spread(valid, 900), valid.nonzero()[:, 0])

    anchors = torch.nn.functional.normalize(torch.randn(120, WIDTH), dim=1)
    labels = torch.arange(120) // 30
    whole, part = Inspection(CLASSES), Inspection(CLASSES)
    samples = PixelSet(anchors, labels)
    term = Term("t", samples, [Side(samples)], 0.1)
    whole.see_term(term, term.contrast)
    monkeypatch.setattr(module, "_MOST_ANCHORS", 40)
    monkeypatch.setattr(module, "_MOST_SAMPLES", 60)
    part.see_term(term, term.contrast)
    found = part.similarities["t"]
    # Of 30 of a class every third is an anchor and every second a sample, and 5 are both.
    assert len(found.positive) == 4 * (10 * 15 - 5) and len(found.negative) == 40 * 45
    everything = whole.similarities["t"].positive
    assert len(everything) == 4 * 30 * 29
    assert torch.isclose(found.positive[:, None], everything, rtol=0, atol=1e-6).any(dim=1).all()
    assert found.positive.max() < 0.9999  # none of itself


def inspect_on_first_rank() -> tuple[dict[str, Tensor], int, int]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    contrast = multi_scale(across_processes=True)
    torch.manual_seed(5 + rank)
    batch = random_batch()
    if rank == 0:
        contrast.inspection = Inspection(CLASSES)
    losses = contrast(*batch, generator=torch.Generator().manual_seed(rank)).losses
    sum(losses.values()).backward()
    found = contrast.inspection
    own = len(found.draws["res2"]["anchors"].image) if found else 0
    pairs = found.similarities["res2"] if found else ()
    return {k: x.detach() for k, x in losses.items()}, own, sum(map(len, pairs[:2]))


def test_one_of_two_processes_looks_at_its_own_images() -> None:
    (losses, own, pairs), (others, none, _) = run_processes(inspect_on_first_rank, 2)
    assert losses.keys() == others.keys() and none == 0
    # Its anchors are contrasted with those of both.
    assert 0 < own and pairs > own * (own - 1)
