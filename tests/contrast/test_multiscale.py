"""Multi- and cross-scale contrast as a whole. Shape letters: B images, A anchors, K classes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from contrast_d2.contrast import (
    BalancedSampler,
    BoundaryNegatives,
    MultiScaleContrast,
    MultiScaleProjector,
    downsample_labels,
    gather_embeddings,
    predicted_labels,
)

from ..helpers import HostWaits, gpu_waits
from . import references

CHANNELS = {"res2": 5, "res3": 6, "res4": 7, "res5": 8}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
SCALE_WEIGHTS = {"res2": 1.0, "res3": 0.7, "res4": 0.4, "res5": 0.1}
CROSS_SCALE = [("res2", "res5", 1.0), ("res2", "res4", 1.0)]
NUM_CLASSES = 4
# Ways to project, as arguments of `build`.
PROJECTIONS = {
    "dense": {},
    "dense, layer norms": {"norm": "layer"},
    "map": {"projection": "sampled", "norm_statistics": "map"},
    "draw": {"projection": "sampled", "norm_statistics": "draw"},
    "layer norms": {"projection": "sampled", "norm": "layer"},
    "linear": {"projection": "sampled", "num_hidden": 0},
}


def build(**arguments) -> MultiScaleContrast:
    """Multi- and cross-scale contrast of few anchors; `arguments` override the defaults."""
    head = {name: arguments.pop(name) for name in ("num_hidden", "norm") if name in arguments}
    projector = MultiScaleProjector(CHANNELS, 6, **{"num_hidden": 1, **head})
    sampler = arguments.pop("sampler", BalancedSampler(NUM_CLASSES, max_anchors=40, floor=10))
    defaults = {"scale_weights": SCALE_WEIGHTS, "cross_scale": CROSS_SCALE}
    return MultiScaleContrast(projector, sampler, **{**defaults, **arguments})


def ms_cs(channels: dict[str, int], num_classes: int) -> MultiScaleContrast:
    """As in the paper."""
    return MultiScaleContrast(
        MultiScaleProjector(channels, 256, num_hidden=2),
        BalancedSampler(num_classes, balance="class", max_anchors=10_000, floor=64),
        scale_weights=SCALE_WEIGHTS,
        cross_scale=CROSS_SCALE,
    )


def ms_cs_release(channels: dict[str, int], num_classes: int) -> MultiScaleContrast:
    """As in the code that the authors published."""
    return MultiScaleContrast(
        MultiScaleProjector(channels, 256, num_hidden=1, bn_momentum=3e-4),
        BalancedSampler(
            num_classes,
            balance="image_class",
            max_anchors=10_000,
            min_pixels=5,
            max_per_group=2500,
        ),
        scale_weights=SCALE_WEIGHTS,
        cross_scale=CROSS_SCALE,
        count_empty_anchors=True,
    )


def random_batch(num_images: int = 2, size: int = 96) -> tuple[dict[str, Tensor], Tensor]:
    """Features and labels; classes come in patches, and class 3 covers one pixel at stride 16."""
    features = {
        name: torch.randn(num_images, c, size // STRIDES[name], size // STRIDES[name])
        for name, c in CHANNELS.items()
    }
    patches = torch.tensor([0, 1, 2, 255])[torch.randint(4, (num_images, size // 8, size // 8))]
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, 16:32, :16] = 3
    return features, labels


def gradients(loss: Tensor, module: torch.nn.Module) -> dict[str, Tensor | None]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters()}


def draw(contrast: MultiScaleContrast, features: dict, labels: Tensor, seed: int) -> dict:
    """The (embeddings, labels) of the anchors that a call with this seed contrasts."""
    maps = [downsample_labels(labels, features[name].shape[-2:]) for name in CHANNELS]
    draws = contrast.sampler(maps, torch.Generator().manual_seed(seed))
    embeddings = contrast.projector(features)
    return {
        name: (gather_embeddings(embeddings[name], d.image, d.pixel), d.labels.tolist())
        for name, d in zip(CHANNELS, draws, strict=True)
    }


def run(contrast: MultiScaleContrast, features: dict, labels: Tensor, seed: int = 1):
    return contrast(features, None, labels, torch.Generator().manual_seed(seed))


def double(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: f.double().requires_grad_() for name, f in features.items()}


# ---- the equations


@pytest.mark.parametrize("count_empty", [False, True])
def test_total_equals_the_equations(count_empty: bool) -> None:
    features, labels = random_batch()
    features = double(features)
    contrast = build(
        weight=0.2,
        cross_weight=0.3,
        cross_scale=[("res2", "res5", 1.0), ("res2", "res4", 0.5)],
        temperature=0.1,
        cross_temperature=0.4,
        count_empty_anchors=count_empty,
    ).double()
    losses = run(contrast, features, labels).losses
    anchors = draw(contrast, features, labels, seed=1)
    within = {name: references.within_loss(*anchors[name], 0.1, count_empty) for name in CHANNELS}
    cross = {
        other: references.cross_loss(*anchors["res2"], *anchors[other], 0.4, count_empty)
        for other in ("res5", "res4")
    }
    expected = {
        "loss_contrast_res2": 0.2 * within["res2"],
        "loss_contrast_res3": 0.2 * 0.7 * within["res3"],
        "loss_contrast_res4": 0.2 * 0.4 * within["res4"],
        "loss_contrast_res5": 0.2 * 0.1 * within["res5"],
        "loss_contrast_res2_res5": 0.3 * cross["res5"],
        "loss_contrast_res2_res4": 0.3 * 0.5 * cross["res4"],
    }
    assert list(losses) == list(expected)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    inputs = [*features.values(), *contrast.parameters()]
    actual_gradients = torch.autograd.grad(sum(losses.values()), inputs, retain_graph=True)
    expected_gradients = torch.autograd.grad(sum(expected.values()), inputs)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-7, atol=1e-12)


def test_the_default_weights_are_those_of_the_paper() -> None:
    features, labels = random_batch()
    contrast, scaled = build(), build(weight=1.0, cross_weight=1.0)
    scaled.load_state_dict(contrast.state_dict())
    losses, unscaled = run(contrast, features, labels).losses, run(scaled, features, labels).losses
    for name, loss in losses.items():
        torch.testing.assert_close(loss, 0.1 * unscaled[name])


def test_symmetric_takes_half_of_each_direction() -> None:
    features, labels = random_batch()
    contrast = build(symmetric=True, cross_weight=0.3, cross_temperature=0.2).double()
    features = double(features)
    losses = run(contrast, features, labels).losses
    assert [name for name in losses if name.count("res") == 2] == [
        "loss_contrast_res2_res5",
        "loss_contrast_res5_res2",
        "loss_contrast_res2_res4",
        "loss_contrast_res4_res2",
    ]
    anchors = draw(contrast, features, labels, seed=1)
    for first, second in [("res2", "res5"), ("res5", "res2"), ("res2", "res4"), ("res4", "res2")]:
        expected = 0.15 * references.cross_loss(*anchors[first], *anchors[second], 0.2)
        torch.testing.assert_close(losses[f"loss_contrast_{first}_{second}"], expected)


@pytest.mark.parametrize("count_empty", [False, True])
def test_drawn_negatives_take_the_place_of_other_classes(count_empty: bool) -> None:
    features, labels = random_batch()
    features, logits = double(features), torch.randn(2, NUM_CLASSES, 24, 24)
    negatives = BoundaryNegatives(NUM_CLASSES, max_negatives=30)
    contrast = build(negatives=negatives, count_empty_anchors=count_empty).double()
    output = contrast(features, logits, labels, torch.Generator().manual_seed(1))

    generator = torch.Generator().manual_seed(1)
    label_maps = [downsample_labels(labels, features[name].shape[-2:]) for name in CHANNELS]
    predictions = [predicted_labels(logits, tuple(x.shape[-2:])) for x in label_maps]
    draws = contrast.sampler(label_maps, generator)
    negative_draws = negatives(label_maps, predictions, generator)
    assert 0 < min(len(d.labels) for d in negative_draws) < 30
    maps = contrast.projector(features)
    embeddings = {
        name: [gather_embeddings(maps[name], d.image, d.pixel) for d in pair]
        for name, pair in zip(CHANNELS, zip(draws, negative_draws, strict=True), strict=True)
    }
    classes = {
        name: [d.labels.tolist() for d in pair]
        for name, pair in zip(CHANNELS, zip(draws, negative_draws, strict=True), strict=True)
    }
    expected = {}
    for term in contrast.terms:
        source, target = term.anchors, term.contrast or term.anchors
        loss = references.two_role_loss(
            embeddings[source][0],
            classes[source][0],
            *embeddings[target],
            *classes[target],
            term.temperature,
            count_empty,
            among_themselves=term.contrast is None,
        )
        expected[f"loss_contrast_{term.name}"] = term.weight * loss
    torch.testing.assert_close(output.losses, expected, rtol=1e-9, atol=1e-12)
    inputs = [*features.values(), *contrast.parameters()]
    actual = torch.autograd.grad(sum(output.losses.values()), inputs, retain_graph=True)
    wanted = torch.autograd.grad(sum(expected.values()), inputs)
    torch.testing.assert_close(actual, wanted, rtol=1e-7, atol=1e-12)

    units, labels_N = embeddings["res5"][1].detach(), torch.tensor(classes["res5"][1])
    anchors, labels_A = embeddings["res2"][0].detach(), torch.tensor(classes["res2"][0])
    different = labels_A[:, None] != labels_N
    statistics = {
        name.rpartition("/")[2]: x for name, x in output.statistics.items() if "res2_res5" in name
    }
    assert statistics["negatives"] == len(labels_N)
    torch.testing.assert_close(
        statistics["negative_similarity"], (anchors @ units.T)[different].mean()
    )


def test_without_wrong_pixels_nothing_repels() -> None:
    features, labels = random_batch()
    # Right at every pixel of every map: maps of strides that divide see the same labels.
    logits = torch.nn.functional.one_hot(labels[:, ::4, ::4] % 255, NUM_CLASSES).movedim(-1, 1)
    contrast = build(
        negatives=BoundaryNegatives(NUM_CLASSES), scale_weights={"res2": 1.0}, cross_scale=()
    )
    output = contrast(features, logits.float(), labels)
    assert output.losses["loss_contrast_res2"] == 0
    found = gradients(output.losses["loss_contrast_res2"], contrast)
    assert all((grad == 0).all() for grad in found.values())


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_drawn_negatives_with_all_projections(projection: str) -> None:
    features, labels = random_batch()
    contrast = build(negatives=BoundaryNegatives(NUM_CLASSES), **PROJECTIONS[projection])
    losses = contrast(features, torch.randn(2, NUM_CLASSES, 24, 24), labels).losses
    assert all(loss > 0 and loss.isfinite() for loss in losses.values())
    found = gradients(sum(losses.values()), contrast)
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())


def test_drawn_negatives_need_predictions() -> None:
    features, labels = random_batch()
    with pytest.raises(ValueError, match="need the class scores"):
        build(negatives=BoundaryNegatives(NUM_CLASSES))(features, None, labels)


@pytest.mark.parametrize("detach", [False, True])
def test_detach_contrast_stops_the_gradient_of_the_other_side(detach: bool) -> None:
    features, labels = random_batch()
    contrast = build(detach_contrast=detach)
    losses = run(contrast, features, labels).losses
    found = gradients(losses["loss_contrast_res2_res5"], contrast)
    assert found["projector.heads.res2.0.weight"].any()
    other_side = found["projector.heads.res5.0.weight"]
    assert (other_side is None or not other_side.any()) == detach


def test_detach_contrast_leaves_the_terms_within_scales_alone() -> None:
    features, labels = random_batch()
    plain, detached = build(), build(detach_contrast=True)
    detached.load_state_dict(plain.state_dict())
    found = [
        gradients(run(contrast, features, labels).losses["loss_contrast_res5"], contrast)
        for contrast in (plain, detached)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert found[0]["projector.heads.res5.0.weight"].any()


def test_statistics_are_those_of_the_anchors() -> None:
    features, labels = random_batch()
    contrast = build().double()
    statistics = run(contrast, double(features), labels).statistics
    anchors = draw(contrast, double(features), labels, seed=1)
    terms = {name: (name, name) for name in CHANNELS}
    terms.update({"res2_res5": ("res2", "res5"), "res2_res4": ("res2", "res4")})
    quantities = ("anchors", "classes", "positive_similarity", "negative_similarity")
    assert list(statistics) == [f"contrast/{term}/{q}" for term in terms for q in quantities]
    for term, (first, second) in terms.items():
        (embeddings, classes), (others, other_classes) = anchors[first], anchors[second]
        same, different = [], []
        for i, label in enumerate(classes):
            for j, other in enumerate(other_classes):
                if first != second or i != j:
                    (same if label == other else different).append(
                        torch.dot(embeddings[i], others[j]).item()
                    )
        expected = [
            len(classes),
            len(set(classes)),
            sum(same) / len(same),
            sum(different) / len(different),
        ]
        actual = [statistics[f"contrast/{term}/{q}"] for q in quantities]
        assert [a.item() for a in actual] == pytest.approx(expected)
        assert not any(a.requires_grad or a.dim() for a in actual)


# ---- presets


@pytest.mark.parametrize("preset", [ms_cs, ms_cs_release])
def test_presets(preset) -> None:
    features, labels = random_batch(size=128)
    contrast = preset(CHANNELS, NUM_CLASSES)
    output = contrast(features, None, labels)
    assert list(output.losses) == [
        "loss_contrast_res2",
        "loss_contrast_res3",
        "loss_contrast_res4",
        "loss_contrast_res5",
        "loss_contrast_res2_res5",
        "loss_contrast_res2_res4",
    ]
    assert all(loss > 0 and loss.dtype == torch.float32 for loss in output.losses.values())
    found = gradients(sum(output.losses.values()), contrast)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    ("preset", "at_stride_8"),
    # 40 pixels of class 1 in one image of four; classes 0 and 2 share the rest. The paper levels
    # classes at max(40, floor of 64); the release levels seven (image, class) pairs at 40.
    [(ms_cs, {0: 64, 1: 40, 2: 64}), (ms_cs_release, {0: 160, 1: 40, 2: 160})],
)
def test_presets_balance_as_they_say(preset, at_stride_8: dict[int, int]) -> None:
    grid = torch.zeros(4, 16, 16, dtype=torch.long)
    grid[:, 8:] = 2
    grid[0, 0, :16] = 1
    grid[0, 1, :16] = 1
    grid[0, 2, :8] = 1
    contrast = preset(CHANNELS, NUM_CLASSES)
    (drawn,) = contrast.sampler([grid])
    labels, counts = drawn.labels.unique(return_counts=True)
    assert dict(zip(labels.tolist(), counts.tolist(), strict=True)) == at_stride_8


def test_the_release_leaves_out_what_is_smaller_than_five_pixels() -> None:
    grid = torch.zeros(1, 16, 16, dtype=torch.long)
    grid[0, 8:] = 1
    grid[0, 0, :4] = 2
    (drawn,) = ms_cs_release(CHANNELS, NUM_CLASSES).sampler([grid])
    assert drawn.labels.unique().tolist() == [0, 1]
    (drawn,) = ms_cs(CHANNELS, NUM_CLASSES).sampler([grid])
    assert drawn.labels.unique().tolist() == [0, 1, 2]


# ---- degenerate crops


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("fixed_size", [False, True])
def test_no_anchors_give_zeros_in_every_projection(projection: str, fixed_size: bool) -> None:
    features, labels = random_batch(size=64)
    labels[:] = 255
    sampler = BalancedSampler(NUM_CLASSES, max_anchors=40, floor=10, fixed_size=fixed_size)
    for num_anchors in (0, 1):
        labels.view(-1)[:num_anchors] = 1
        contrast = build(**PROJECTIONS[projection], sampler=sampler)
        inputs = {name: f.clone().requires_grad_() for name, f in features.items()}
        output = contrast(inputs, None, labels)
        assert [loss.item() for loss in output.losses.values()] == [0] * 6
        assert output.statistics["contrast/res2/anchors"] == num_anchors
        found = gradients(sum(output.losses.values()), contrast)
        found.update({name: f.grad for name, f in inputs.items()})
        assert all(gradient is not None and not gradient.any() for gradient in found.values())
        assert all(buffer.isfinite().all() for buffer in contrast.buffers())


@pytest.mark.parametrize("preset", [ms_cs, ms_cs_release])
@pytest.mark.parametrize("fill", [255, 2])
def test_nothing_to_contrast_gives_zeros(preset, fill: int) -> None:
    features, _ = random_batch(size=64)
    features = {name: f.requires_grad_() for name, f in features.items()}
    contrast = preset(CHANNELS, NUM_CLASSES)
    output = contrast(features, None, torch.full((2, 64, 64), fill))
    assert [loss.item() for loss in output.losses.values()] == [0] * 6
    assert output.statistics["contrast/res2/anchors"] == (0 if fill == 255 else 512)
    assert output.statistics["contrast/res2/negative_similarity"].isnan()
    found = gradients(sum(output.losses.values()), contrast)
    found.update({name: f.grad for name, f in features.items()})
    assert all(gradient is not None and not gradient.any() for gradient in found.values())


def test_a_class_that_vanishes_at_a_coarse_scale() -> None:
    features, labels = random_batch()
    labels[:] = 0
    labels[:, 48:] = 1
    labels[0, 4:8, 4:8] = 2  # one pixel at stride 4, and none that stride 8 and above would read
    output = run(build(), features, labels)
    classes = [output.statistics[f"contrast/{name}/classes"].item() for name in CHANNELS]
    assert classes == [3, 2, 2, 2]
    assert all(loss.isfinite() and loss > 0 for loss in output.losses.values())


# ---- projection


def step(contrast: MultiScaleContrast, features: dict[str, Tensor], labels: Tensor) -> dict:
    """All that a training step leaves behind, in float64."""
    contrast = contrast.double()
    inputs = double(features)
    generator = torch.Generator().manual_seed(5)
    output = contrast(inputs, None, labels, generator)
    parameters = gradients(sum(output.losses.values()), contrast)
    return {
        "losses": {name: loss.detach() for name, loss in output.losses.items()},
        "statistics": output.statistics,
        "generator": generator.get_state(),
        "buffers": dict(contrast.named_buffers()),
        "features": {name: x.grad for name, x in inputs.items()},
        "parameters": parameters,
    }


@pytest.mark.parametrize(
    ("dense", "sampled"),
    [
        ({"norm": "layer", "num_hidden": 2}, {"norm": "layer", "num_hidden": 2}),
        ({"num_hidden": 0}, {"num_hidden": 0}),
    ],
)
@pytest.mark.parametrize("fixed_size", [False, True])
def test_sampled_projection_is_dense_projection(
    dense: dict, sampled: dict, fixed_size: bool
) -> None:
    features, labels = random_batch()
    sampler = BalancedSampler(NUM_CLASSES, max_anchors=40, floor=10, fixed_size=fixed_size)
    first = build(**dense, sampler=sampler)
    second = build(**sampled, sampler=sampler, projection="sampled")
    second.load_state_dict(first.state_dict())
    expected = step(first, features, labels)
    assert all(loss > 0 for loss in expected["losses"].values())
    torch.testing.assert_close(step(second, features, labels), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fixed_size", [False, True])
def test_map_statistics_give_the_losses_of_dense_projection(fixed_size: bool) -> None:
    features, labels = random_batch()
    sampler = BalancedSampler(NUM_CLASSES, max_anchors=40, floor=10, fixed_size=fixed_size)
    dense = build(num_hidden=2, sampler=sampler)
    sampled = build(num_hidden=2, sampler=sampler, **PROJECTIONS["map"])
    sampled.load_state_dict(dense.state_dict())
    expected, found = step(dense, features, labels), step(sampled, features, labels)
    for key in ("losses", "statistics", "generator", "buffers"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)
    # No gradient through the statistics: only drawn pixels receive one.
    at_stride_4 = found["features"]["res2"].abs().sum(1)
    num_anchors = found["statistics"]["contrast/res2/anchors"]
    # Some have hidden units that are all at rest.
    assert 0.5 * num_anchors < (at_stride_4 > 0).sum() <= num_anchors
    assert (expected["features"]["res2"].abs().sum(1) > 0).sum() > 5 * num_anchors


def test_draw_statistics_are_those_of_each_scales_anchors() -> None:
    features, labels = random_batch()
    contrast = build(num_hidden=1, **PROJECTIONS["draw"]).double()
    losses = run(contrast, double(features), labels).losses
    maps = [downsample_labels(labels, features[name].shape[-2:]) for name in CHANNELS]
    draws = contrast.sampler(maps, torch.Generator().manual_seed(1))
    for name, drawn in zip(CHANNELS, draws, strict=True):
        x = features[name].double().flatten(2)[drawn.image, :, drawn.pixel]
        head = contrast.projector.heads[name]
        hidden = (x @ head[0].weight.flatten(1).T).relu()
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        embeddings = hidden @ head[3].weight.flatten(1).T + head[3].bias
        embeddings = torch.nn.functional.normalize(embeddings, dim=1)
        expected = references.within_loss(embeddings, drawn.labels.tolist(), 0.1)
        torch.testing.assert_close(
            losses[f"loss_contrast_{name}"], 0.1 * SCALE_WEIGHTS[name] * expected
        )


@pytest.mark.parametrize("projection", ["map", "draw", "layer norms"])
def test_padding_of_a_draw_of_fixed_size_changes_nothing(projection: str) -> None:
    features, labels = random_batch()
    results = []
    for fixed_size in (False, True):
        torch.manual_seed(0)
        sampler = BalancedSampler(NUM_CLASSES, max_anchors=100, floor=5, fixed_size=fixed_size)
        contrast = build(num_hidden=2, sampler=sampler, **PROJECTIONS[projection])
        results.append(step(contrast, features, labels))
    assert results[0]["statistics"]["contrast/res2/anchors"] < 100
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_checkpoints_fit_both_projections(norm: str) -> None:
    features, labels = random_batch()
    sampled = PROJECTIONS["draw"] if norm == "batch" else PROJECTIONS["layer norms"]
    states = []
    for arguments in ({"norm": norm}, {"norm": norm, **sampled}):
        contrast = build(**arguments)
        run(contrast, features, labels)
        states.append({name: value.shape for name, value in contrast.state_dict().items()})
        build(**PROJECTIONS["map"] if norm == "batch" else sampled).load_state_dict(
            contrast.state_dict(), strict=True
        )
    assert states[0] == states[1]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("projection", ["dense", "map", "layer norms"])
def test_the_memory_format_of_features_does_not_matter(projection: str, memory_format) -> None:
    features, labels = random_batch()
    torch.manual_seed(0)
    contrast = build(**PROJECTIONS[projection])
    expected = step(copy.deepcopy(contrast), features, labels)
    features = {n: f.contiguous(memory_format=memory_format) for n, f in features.items()}
    torch.testing.assert_close(step(contrast, features, labels), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("projection", ["dense", "map"])
def test_a_compiled_step_breaks_its_graph_once(projection: str) -> None:
    features, labels = random_batch()
    contrast = build(**PROJECTIONS[projection])
    expected = run(copy.deepcopy(contrast), features, labels)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    output = run(torch.compile(contrast, backend="aot_eager"), features, labels)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (projection == "dense")
    torch.testing.assert_close(output.losses, expected.losses)
    found = gradients(sum(output.losses.values()), contrast)
    assert all(g is not None and g.isfinite().all() for g in found.values())


# ---- as a module


def test_maps_without_a_term_have_no_projector() -> None:
    contrast = build(scale_weights={**SCALE_WEIGHTS, "res3": 0.0, "res5": 0.0})
    # res5 still stands in a cross-scale pair.
    assert set(contrast.projector.heads) == {"res2", "res4", "res5"}
    features, labels = random_batch()
    del features["res3"]
    losses = contrast(features, None, labels).losses
    assert list(losses) == [
        "loss_contrast_res2",
        "loss_contrast_res4",
        "loss_contrast_res2_res5",
        "loss_contrast_res2_res4",
    ]
    assert all(g.any() for g in gradients(sum(losses.values()), contrast).values())
    contrast = build(cross_weight=0.0, scale_weights={"res3": 1.0})
    assert set(contrast.projector.heads) == {"res3"}


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_bf16_autocast(projection: str) -> None:
    features, labels = random_batch()
    contrast = build(**{"num_hidden": 2, **PROJECTIONS[projection]})
    plain = run(contrast, features, labels).losses
    reference = gradients(sum(plain.values()), contrast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run(contrast, features, labels).losses
    found = gradients(sum(losses.values()), contrast)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        # Only the projector is rounded: by 2^-9, times 1 / temperature.
        torch.testing.assert_close(loss, plain[name], rtol=0.05, atol=0)
    for name, gradient in found.items():
        assert gradient.isfinite().all() and gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0)
        assert cosine > 0.8, name  # kinks of the ReLUs turn it to 0.96


def test_state_dict_round_trip() -> None:
    features, labels = random_batch()
    contrast, other = build(), build()
    before = run(other, features, labels).losses
    run(contrast, features, labels)  # moves the running statistics
    other.load_state_dict(copy.deepcopy(contrast.state_dict()), strict=True)
    contrast.eval(), other.eval()
    expected = run(contrast, features, labels).losses
    assert expected == run(other, features, labels).losses
    assert expected != before


def test_the_generator_fixes_the_step() -> None:
    features, labels = random_batch()
    contrast = build()
    losses = [run(contrast, features, labels, seed).losses for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type(labels_dtype: torch.dtype) -> None:
    features, labels = random_batch()
    contrast = build()
    expected = run(contrast, features, labels).losses
    assert run(contrast, features, labels.to(labels_dtype)).losses == expected


def test_sizes_that_do_not_divide() -> None:
    features, _ = random_batch(num_images=1, size=96)
    labels = torch.zeros(1, 90, 67, dtype=torch.long)
    labels[:, 45:] = 1
    statistics = run(build(), features, labels).statistics
    for name in CHANNELS:
        size = features[name].shape[-1]
        upper = size * sum(row * 90 // size < 45 for row in range(size))
        counts = [upper, size * size - upper]
        # 40 anchors for two classes, and a floor of 10.
        target = min(max(min(counts), 10), 20)
        assert statistics[f"contrast/{name}/anchors"] == sum(min(n, target) for n in counts)
        assert statistics[f"contrast/{name}/classes"] == 2


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("fixed_size", [False, True])
def test_a_step_waits_once_for_the_device(projection: str, fixed_size: bool) -> None:
    features, labels = random_batch()
    sampler = BalancedSampler(NUM_CLASSES, max_anchors=40, floor=10, fixed_size=fixed_size)
    contrast = build(**PROJECTIONS[projection], sampler=sampler)
    with HostWaits() as waits:
        output = contrast(features, None, labels)
        sum(output.losses.values()).backward()
    # How many anchors there are.
    assert len(waits.calls) == (0 if fixed_size else 1), waits.calls


@pytest.mark.gpu
def test_a_step_waits_once_for_the_gpu() -> None:
    features, labels = random_batch()
    features = {name: f.cuda() for name, f in features.items()}
    labels, contrast = labels.cuda(), build().cuda()

    def step() -> None:
        output = contrast(features, None, labels)
        sum(output.losses.values()).backward()

    assert gpu_waits(step) == 1


def test_bf16_products_round_the_gradients_only() -> None:
    features, labels = random_batch()
    gradients = {}
    for products in ("fp32", "bf16"):
        torch.manual_seed(2)
        inputs = {name: x.detach().clone().requires_grad_() for name, x in features.items()}
        losses = run(build(products=products), inputs, labels).losses
        gradients[products] = [
            *losses.values(),
            *torch.autograd.grad(sum(losses.values()), list(inputs.values())),
        ]
    for number, (rounded, exact) in enumerate(zip(*gradients.values(), strict=True)):
        error = (rounded - exact).norm() / exact.norm()
        assert error < 1e-6 if number < len(losses) else 1e-4 < error < 2e-2


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"cross_temperature": -1.0}, "cross_temperature=-1.0: must be above 0"),
        ({"weight": -0.1}, "weight=-0.1: must be 0 or more"),
        ({"weight": math.nan}, "weight=nan"),
        ({"cross_weight": -0.1}, "cross_weight=-0.1"),
        ({"scale_weights": {"res2": -1.0}}, r"scale_weights\['res2'\]=-1.0"),
        ({"scale_weights": {"res1": 1.0}}, "'res1'.*Did you mean 'res"),
        ({"scale_weights": {}, "cross_scale": []}, "nothing to contrast"),
        ({"scale_weights": {"res2": 0.0}, "cross_scale": []}, "nothing to contrast"),
        ({"weight": 0.0, "cross_weight": 0.0}, "nothing to contrast"),
        ({"cross_scale": [("res2", "res5")]}, r"\['res2', 'res5'\]: give \(anchor map"),
        ({"cross_scale": [("res2", "res2", 1.0)]}, "pairs 'res2' with itself"),
        ({"cross_scale": [("res2", "res5", -1.0)]}, "pair res2-res5=-1.0"),
        ({"cross_scale": [("res2", "res5", 1.0)] * 2}, r"\(res2, res5\) twice"),
        (
            {"cross_scale": [("res2", "res5", 1.0), ("res5", "res2", 1.0)], "symmetric": True},
            r"\(res5, res2\) twice",
        ),
        ({"products": "fp16"}, "products='fp16': choose one of"),
        ({"across_processes": True}, "across_processes=True here and False in the sampler"),
        ({"projection": "rows"}, "projection='rows': choose 'dense' or 'sampled'"),
        ({"norm_statistics": "draw"}, "norm_statistics='draw' with projection='dense'"),
        (
            {"projection": "sampled", "norm_statistics": "batch"},
            "norm_statistics='batch': choose 'map', 'draw' or None",
        ),
        ({"projection": "sampled"}, "norm_statistics=None.*must be 'map' or 'draw'"),
        ({**PROJECTIONS["map"], "norm": "layer"}, "='map'.*None for one without"),
        ({**PROJECTIONS["draw"], "num_hidden": 0}, "='draw'.*None for one without"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)
