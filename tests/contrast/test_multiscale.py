"""Multi- and cross-scale contrast against its equations. Shape letters: A anchors, K classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contrast_d2.contrast import (
    BalancedSampler,
    Batch,
    BoundaryNegatives,
    MultiScaleContrast,
    MultiScaleProjector,
    PixelDraw,
)

from . import references

K = 4
CHANNELS = {"res2": 5, "res3": 6, "res4": 7}
SCALE_WEIGHTS = {"res2": 1.0, "res3": 0.7, "res4": 0.4}
CROSS_SCALE = [("res2", "res4", 1.0), ("res3", "res4", 0.5)]


def build(head: dict | None = None, **options) -> MultiScaleContrast:
    """Multi- and cross-scale contrast of few anchors; `options` override the defaults."""
    torch.manual_seed(0)
    projector = MultiScaleProjector(CHANNELS, 6, **{"num_hidden": 1, **(head or {})})
    sampler = BalancedSampler(K, max_anchors=40, min_per_class=10)
    defaults = {"scale_weights": SCALE_WEIGHTS, "cross_scale": CROSS_SCALE}
    return MultiScaleContrast(projector, sampler, **{**defaults, **options}).double()


def random_batch() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Class 3 covers one pixel at stride 16; scores are right for some pixels."""
    features = {
        name: torch.randn(2, c, 64 // stride, 64 // stride, dtype=torch.float64).requires_grad_()
        for (name, c), stride in zip(CHANNELS.items(), (4, 8, 16), strict=True)
    }
    patches = torch.tensor([0, 1, 2, 255])[torch.randint(4, (2, 8, 8))]
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, 16:32, :16] = 3
    return features, labels, torch.randn(2, K, 16, 16).double()


def run(contrast: MultiScaleContrast, batch: tuple):
    return contrast(*batch, generator=torch.Generator().manual_seed(1))


def drawn(contrast: MultiScaleContrast, batch: tuple) -> tuple[dict, dict]:
    """(embeddings, labels) of the anchors, and of the negatives, by scale."""
    maps = contrast.projector(batch[0])
    seen = Batch(maps, *batch[1:], torch.Generator().manual_seed(1))
    found = contrast.sample(seen, list(maps), contrast.sampler, contrast.negatives)
    return tuple({n: (x.embeddings, x.labels.tolist()) for n, x in sets.items()} for sets in found)


def test_losses_gradients_and_statistics_are_those_of_the_equations() -> None:
    cases = [
        {},
        {"temperature": 0.3, "weight": 0.2},
        {"count_empty_anchors": True},
        {"negatives": BoundaryNegatives(K, max_negatives=9)},
        {"negatives": BoundaryNegatives(K, max_negatives=9), "count_empty_anchors": True},
    ]
    for options in cases:
        contrast, batch = build(**options), random_batch()
        output = run(contrast, batch)
        anchors, negatives = drawn(contrast, batch)
        weight, temperature = options.get("weight", 0.1), options.get("temperature", 0.1)
        count_empty = options.get("count_empty_anchors", False)
        rows = [(n, n, w) for n, w in SCALE_WEIGHTS.items()] + CROSS_SCALE
        expected = {}
        for source, target, w in rows:
            name = source if source == target else f"{source}_{target}"
            if negatives:
                loss = references.two_role_loss(
                    *anchors[source],
                    anchors[target][0],
                    negatives[target][0],
                    anchors[target][1],
                    negatives[target][1],
                    temperature,
                    count_empty,
                    among_themselves=source == target,
                )
            elif source == target:
                loss = references.within_loss(*anchors[source], temperature, count_empty)
            else:
                loss = references.cross_loss(
                    *anchors[source], *anchors[target], temperature, count_empty
                )
            expected[f"loss_contrast_{name}"] = weight * w * loss
            found = {k.split("/")[2]: v for k, v in output.statistics.items() if f"/{name}/" in k}
            others = negatives.get(target, anchors[target])
            same, different = pair_means(anchors[source], anchors[target], others, source == target)
            assert found["anchors"] == len(anchors[source][1])
            assert found["classes"] == len(set(anchors[source][1]))
            assert found["positive_similarity"].item() == pytest.approx(same)
            assert found["negative_similarity"].item() == pytest.approx(different)
            assert ("negatives" in found) == bool(negatives)
            if negatives:
                assert found["negatives"] == len(negatives[target][1])
        assert list(output.losses) == list(expected)
        torch.testing.assert_close(output.losses, expected, rtol=1e-9, atol=0)
        inputs = [*batch[0].values(), *contrast.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(sum(output.losses.values()), inputs, retain_graph=True),
            torch.autograd.grad(sum(expected.values()), inputs),
            rtol=1e-7,
            atol=1e-12,
        )


def pair_means(anchors: tuple, positives: tuple, negatives: tuple, within: bool) -> tuple:
    same = [
        torch.dot(a, b).item()
        for i, (a, own) in enumerate(zip(*anchors, strict=True))
        for j, (b, other) in enumerate(zip(*positives, strict=True))
        if own == other and not (within and i == j)
    ]
    different = [
        torch.dot(a, b).item()
        for a, own in zip(*anchors, strict=True)
        for b, other in zip(*negatives, strict=True)
        if own != other
    ]
    return sum(same) / len(same), sum(different) / len(different)


def step(contrast: MultiScaleContrast, batch: tuple) -> dict:
    """All that a training step leaves behind."""
    features = {name: x.detach().clone().requires_grad_() for name, x in batch[0].items()}
    output = run(contrast, (features, *batch[1:]))
    inputs = [*features.values(), *contrast.parameters()]
    return {
        "losses": {name: loss.detach() for name, loss in output.losses.items()},
        "statistics": output.statistics,
        "gradients": torch.autograd.grad(sum(output.losses.values()), inputs),
    }


def test_sampled_projection_is_dense_projection() -> None:
    batch = random_batch()
    for head in ({"norm": "layer", "num_hidden": 2}, {"norm": None}, {"num_hidden": 0}):
        expected = step(build(head), batch)
        found = step(build({**head, "projection": "sampled"}), batch)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_sampled_batch_norms_have_the_statistics_of_each_scales_anchors() -> None:
    batch = random_batch()
    contrast = build({"projection": "sampled"})
    losses = run(contrast, batch).losses
    maps = contrast.projector(batch[0])
    draws = contrast.sampler.draw(
        Batch(maps, batch[1], None, torch.Generator().manual_seed(1)), list(maps)
    )
    for name, draw in zip(maps, draws, strict=True):
        head = contrast.projector.heads[name]
        hidden = maps[name].flatten(2)[draw.image, :, draw.pixel] @ head[0].weight.flatten(1).T
        hidden = hidden.relu()
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        embeddings = hidden @ head[3].weight.flatten(1).T + head[3].bias
        embeddings = torch.nn.functional.normalize(embeddings, dim=1)
        expected = references.within_loss(embeddings, draw.labels.tolist(), 0.1)
        torch.testing.assert_close(
            losses[f"loss_contrast_{name}"], 0.1 * SCALE_WEIGHTS[name] * expected
        )


def padded(draw: PixelDraw, pixels: int) -> PixelDraw:
    """As a GPU pads draws whose size the host does not know, by pixels that are not drawn."""
    drawn = set((draw.image * pixels + draw.pixel).tolist())
    more = torch.tensor([i for i in range(2 * pixels) if i not in drawn][:7], dtype=torch.long)
    labels = torch.cat([draw.labels, torch.full_like(more, -1)])
    image, pixel = more // pixels, more % pixels
    return PixelDraw(torch.cat([draw.image, image]), torch.cat([draw.pixel, pixel]), labels, None)


def test_padding_of_a_draw_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch()
    for head in ({}, {"projection": "sampled"}, {"projection": "sampled", "norm": "layer"}):
        contrast = build(head)
        expected, draw = step(build(head), batch), contrast.sampler.draw

        def with_padding(batch: Batch, features: list[str], draw=draw) -> list[PixelDraw]:
            sizes = [batch.host_labels(feature)[0].numel() for feature in features]
            draws = zip(draw(batch, features), sizes, strict=True)
            return [padded(drawn, pixels) for drawn, pixels in draws]

        monkeypatch.setattr(contrast.sampler, "draw", with_padding)
        torch.testing.assert_close(step(contrast, batch), expected, rtol=1e-9, atol=1e-12)


def test_checkpoints_fit_both_projections() -> None:
    dense, sampled = build(), build({"projection": "sampled"})
    run(dense, random_batch())
    sampled.load_state_dict(dense.state_dict(), strict=True)
    dense.load_state_dict(sampled.state_dict(), strict=True)


def test_a_class_that_vanishes_at_a_coarse_scale() -> None:
    features, labels, _ = random_batch()
    labels[:] = 0
    labels[:, 32:] = 1
    labels[0, 4:8, 4:8] = 2  # one pixel at stride 4, and none that stride 8 and above would read
    output = run(build(), (features, labels))
    assert [output.statistics[f"contrast/{name}/classes"].item() for name in CHANNELS] == [3, 2, 2]
    assert all(loss.isfinite() and loss > 0 for loss in output.losses.values())


def test_maps_without_a_term_have_no_projector() -> None:
    contrast = build(scale_weights={"res2": 1.0, "res3": 0.0}, cross_scale=[("res2", "res4", 1.0)])
    assert set(contrast.projector.heads) == {"res2", "res4"}
    features, labels, _ = random_batch()
    del features["res3"]
    losses = run(contrast, (features, labels)).losses
    assert list(losses) == ["loss_contrast_res2", "loss_contrast_res2_res4"]
    gradients = torch.autograd.grad(sum(losses.values()), list(contrast.parameters()))
    assert all(x.any() for x in gradients)


def test_wrong_arguments_are_named() -> None:
    cases = {
        "temperature=0.0": {"temperature": 0.0},
        "temperature=nan": {"temperature": math.nan},
        "weight=-0.1": {"weight": -0.1},
        "weight=nan": {"weight": math.nan},
        "res2=-1.0": {"scale_weights": {"res2": -1.0}},
        "'res1'.*'res": {"scale_weights": {"res1": 1.0}},
        r"scale_weights=\{\} and cross_scale=\[\]": {"scale_weights": {}, "cross_scale": []},
        "nothing to contrast": {"weight": 0.0},
        r"\['res2', 'res4'\]": {"cross_scale": [("res2", "res4")]},
        "'res2'": {"cross_scale": [("res2", "res2", 1.0)]},
        "res2_res4=-1.0": {"cross_scale": [("res2", "res4", -1.0)]},
        r"\(res2, res4\)": {"cross_scale": [("res2", "res4", 1.0)] * 2},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            build(**options)
