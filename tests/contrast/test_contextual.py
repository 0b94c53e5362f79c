"""Contextrast as a whole. Shape letters: I layers, B images, K classes, D embedding width."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import MultiScaleProjector, downsample_labels, predicted_labels
from contrast_d2.contrast.boundary import boundary_negatives
from contrast_d2.contrast.class_anchors import layer_pixels
from contrast_d2.contrast.contextual import Contextrast
from contrast_d2.contrast.contextual_plus import AdaptiveFusion, AnchorMemory

from ..helpers import HostWaits, gpu_waits
from . import references, references_contextual

CHANNELS = {"res2": 5, "res3": 6, "res5": 8}
STRIDES = {"res2": 4, "res3": 8, "res5": 16}
LAYERS = {"res2": 0.1, "res3": 0.4, "res5": 1.0}
NUM_CLASSES = 5
WIDTH = 6
PLUS = {"fusion": "adaptive", "anchor_memory": 3}


def build(**arguments) -> Contextrast:
    """Three layers; `arguments` override the defaults."""
    head = {name: arguments.pop(name) for name in ("num_hidden", "norm") if name in arguments}
    projector = MultiScaleProjector(CHANNELS, WIDTH, **{"num_hidden": 1, **head})
    return Contextrast(projector, NUM_CLASSES, **{"layers": LAYERS, **arguments})


def random_batch(num_images: int = 2, size: int = 64) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features, class scores, labels. Class 3 is missing at stride 16, class 4 everywhere."""
    features = {
        name: torch.randn(num_images, c, size // STRIDES[name], size // STRIDES[name])
        for name, c in CHANNELS.items()
    }
    patches = torch.tensor([0, 1, 2, 255])[torch.randint(4, (num_images, size // 8, size // 8))]
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, 8:16, 8:16] = 3
    coarse = torch.randn(num_images, NUM_CLASSES, size // 16, size // 16)
    scores = F.interpolate(coarse, scale_factor=4, mode="bilinear")
    truth = downsample_labels(labels, scores.shape[-2:])
    scores += 1.5 * F.one_hot(truth % 255 % NUM_CLASSES, NUM_CLASSES).movedim(-1, 1)
    return features, scores, labels


def perfect_scores(labels: Tensor) -> Tensor:
    return 9.0 * F.one_hot(labels % 255, NUM_CLASSES).movedim(-1, 1)


def run(contrast: Contextrast, features: dict, scores: Tensor, labels: Tensor, seed: int = 1):
    return contrast(features, scores, labels, torch.Generator().manual_seed(seed))


def gradients(loss: Tensor, module: torch.nn.Module) -> dict[str, Tensor | None]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters()}


def double(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: f.double().requires_grad_() for name, f in features.items()}


def unzero_fusion(contrast: Contextrast) -> None:
    """Values of the attentions as training would have moved them away from zero."""
    for name, parameter in contrast.fusion.named_parameters():
        if ".value." in name:
            torch.nn.init.normal_(parameter, std=0.3)


# ---- the equations


@pytest.mark.parametrize("negatives", ["other_classes", "false_positives", "own_class"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"deepest_weight": 0.7, "normalize_anchors": False, "boundary_fraction": 1.0},
        {"detach_deepest": True, "min_pixels": 4, "boundary_fraction": 0.2},
    ],
)
def test_losses_equal_the_equations(negatives: str, options: dict) -> None:
    features, scores, labels = random_batch()
    features = double(features)
    contrast = build(weight=0.2, temperature=0.3, negatives=negatives, **options).double()
    losses = run(contrast, features, scores, labels).losses

    anchor_options = {k: v for k, v in options.items() if k != "boundary_fraction"}
    layers = references_contextual.read_pixels(
        contrast.projector(features),
        scores,
        labels,
        NUM_CLASSES,
        fraction=options.get("boundary_fraction", 0.5),
        error_map="false_positives" if negatives == "false_positives" else "false_negatives",
        seed=1,
    )
    anchors = references_contextual.mixed_anchors(layers, NUM_CLASSES, **anchor_options)
    assert set(anchors["res2"]) == {0, 1, 2, 3} and 3 not in anchors["res5"]
    expected = {
        f"loss_contrast_{name}": 0.2
        * LAYERS[name]
        * references_contextual.pixel_anchor_loss(anchors[name], layers[name], negatives, 0.3)
        for name in LAYERS
    }
    assert list(losses) == list(expected)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    inputs = [*features.values(), *contrast.projector.parameters()]
    actual_gradients = torch.autograd.grad(sum(losses.values()), inputs, retain_graph=True)
    expected_gradients = torch.autograd.grad(sum(expected.values()), inputs)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-7, atol=1e-12)


def test_gradcheck() -> None:
    torch.manual_seed(3)
    labels = torch.randint(0, NUM_CLASSES, (2, 4, 4))
    scores = torch.randn(2, NUM_CLASSES, 4, 4)
    maps = {
        name: torch.randn(2, WIDTH, *size, dtype=torch.float64, requires_grad=True)
        for name, size in {"res2": (4, 4), "res3": (4, 2), "res5": (2, 2)}.items()
    }
    contrast = build(anchor_memory=4, fusion="adaptive").double()
    unzero_fusion(contrast)
    contrast.contrast(maps, scores, labels)  # anchors of another step to contrast with
    state = copy.deepcopy(contrast.memory.state_dict())

    def total(*values: Tensor) -> Tensor:
        contrast.memory.load_state_dict(state)
        generator = torch.Generator().manual_seed(0)
        named = dict(zip(maps, values, strict=True))
        losses = contrast.contrast(named, scores, labels, generator).losses
        return torch.stack(list(losses.values()))

    noisy = [x.detach().add(0.3 * torch.randn_like(x)).requires_grad_() for x in maps.values()]
    assert (total(*noisy) > 0).all()
    assert torch.autograd.gradcheck(total, noisy, fast_mode=True)


def test_the_default_weights() -> None:
    features, scores, labels = random_batch()
    plain, explicit = build(), build(weight=0.1, temperature=0.1, deepest_weight=0.5)
    explicit.load_state_dict(plain.state_dict())
    assert run(plain, features, scores, labels).losses == (
        run(explicit, features, scores, labels).losses
    )


@pytest.mark.parametrize("negatives", ["other_classes", "false_positives", "own_class"])
@pytest.mark.parametrize("extra", [0, 30])
def test_no_pixel_is_a_negative_of_its_own_class(negatives: str, extra: int) -> None:
    features, scores, labels = random_batch()
    contrast = build(negatives=negatives, extra_negatives=extra, boundary_fraction=1.0)
    pixels = layer_pixels(features["res2"], labels, NUM_CLASSES)
    errors = boundary_negatives(
        pixels.label_map,
        predicted_labels(scores, pixels.label_map.shape[-2:]),
        NUM_CLASSES,
        error_map="false_positives" if negatives == "false_positives" else "false_negatives",
    )
    negative = contrast._negatives(pixels, errors, None)
    assert negative.any()
    own = negative & pixels.of_class
    assert own.any() == (negatives == "own_class")
    ignored = ~pixels.of_class.any(dim=1)
    assert ignored.any() and not negative.mT[ignored].any()


def test_extra_negatives_are_so_many_random_pixels_of_other_classes() -> None:
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, 8:] = 1
    labels[:, 12:] = 255
    scores = perfect_scores(labels)
    maps = {name: torch.ones(1, WIDTH, 16, 16) for name in CHANNELS}
    # With all embeddings equal, a class of m negatives costs log(1 + m).
    for extra in (1, 20, 1000):
        contrast = build(extra_negatives=extra, weight=1.0, layers={"res2": 1.0, "res5": 1.0})
        seen = set()
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            losses = contrast.contrast(maps, scores, labels, generator).losses
            drawn = min(extra, 192)
            possible = {
                round(0.5 * (math.log1p(m) + math.log1p(drawn - m)), 3)
                for m in range(max(0, drawn - 64), min(drawn, 128) + 1)
            }
            found = round(losses["loss_contrast_res2"].item(), 3)
            assert found in possible
            seen.add(found)
        assert len(seen) > 1 or extra != 20
        assert (seen == {round(0.5 * (math.log(65) + math.log(129)), 3)}) == (extra == 1000)


def test_a_class_that_vanishes_keeps_its_own_anchor() -> None:
    labels = torch.full((1, 16, 16), 255)
    # Odd pixels, which strides of 2 and 4 do not read.
    labels[:, 1:8:2, 1::2] = 0
    labels[:, 9::2, 1::2] = 1
    scores = perfect_scores((labels + 1) % 256 % 2)
    maps = {
        name: torch.randn(1, WIDTH, 16 // s, 16 // s)
        for name, s in {"res2": 1, "res3": 2, "res5": 4}.items()
    }
    maps = double(maps)
    mixed = build(deepest_weight=0.9).double()
    own = build(deepest_weight=0.0).double()
    loss = run_maps(mixed, maps, scores, labels)["loss_contrast_res2"]
    expected = run_maps(own, maps, scores, labels)["loss_contrast_res2"]
    assert loss == expected and loss > 0
    loss.backward()
    assert maps["res2"].grad.any() and not maps["res5"].grad.any()
    # Where the deepest layer has them, its anchors count.
    labels[:, ::4, ::4] = labels[:, 1::4, 1::4]
    assert (
        run_maps(mixed, maps, scores, labels)["loss_contrast_res2"]
        != (run_maps(own, maps, scores, labels)["loss_contrast_res2"])
    )


def run_maps(contrast: Contextrast, maps: dict, scores: Tensor, labels: Tensor) -> dict:
    generator = torch.Generator().manual_seed(1)
    return contrast.contrast(maps, scores, labels, generator).losses


@pytest.mark.parametrize("detach", [False, True])
def test_detach_deepest_stops_the_gradient_into_other_layers(detach: bool) -> None:
    features, scores, labels = random_batch()
    contrast = build(detach_deepest=detach)
    losses = run(contrast, features, scores, labels).losses
    found = torch.autograd.grad(
        losses["loss_contrast_res2"],
        contrast.projector.heads["res5"][0].weight,
        allow_unused=True,
        retain_graph=True,
    )[0]
    assert (found is not None and bool(found.any())) != detach
    assert gradients(losses["loss_contrast_res5"], contrast)["projector.heads.res5.0.weight"].any()


def test_the_order_of_images_does_not_matter() -> None:
    features, scores, labels = random_batch(num_images=4)
    contrast = build(boundary_fraction=1.0, norm="layer", **PLUS).double()
    unzero_fusion(contrast)
    results = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        module = copy.deepcopy(contrast)
        for _ in range(2):  # the second pass has anchors to contrast with
            output = run(
                module,
                {n: f[order] for n, f in double(features).items()},
                scores[order],
                labels[order],
            )
        results.append((output, gradients(sum(output.losses.values()), module)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-13)


def test_statistics_are_those_of_the_layers() -> None:
    features, scores, labels = random_batch()
    contrast = build(min_pixels=5).double()
    statistics = run(contrast, double(features), scores, labels).statistics
    arguments = {"fraction": 0.5, "error_map": "false_negatives", "seed": 1}
    maps = contrast.projector(double(features))
    layers = references_contextual.read_pixels(maps, scores, labels, NUM_CLASSES, **arguments)
    anchors = references_contextual.mixed_anchors(layers, NUM_CLASSES, min_pixels=5)
    for name, pixels in layers.items():
        wrong = [(t, p, s) for _, t, p, s in pixels if t != p and t < NUM_CLASSES]
        same = [torch.dot(anchors[name][t], z) for z, t, _, _ in pixels if t in anchors[name]]
        different = [
            torch.dot(anchor, z)
            for n, anchor in anchors[name].items()
            for z, t, _, selected in pixels
            if selected and t != n
        ]
        size = maps[name].shape[-2:]
        truth, predicted = downsample_labels(labels, size), predicted_labels(scores, size)
        region = torch.where((truth != predicted) & (truth < NUM_CLASSES), truth, -1)
        padded = F.pad(region.double(), (1, 1, 1, 1), mode="replicate").long()
        center = padded[:, 1:-1, 1:-1]
        touches = torch.zeros_like(center, dtype=torch.bool)
        for neighbour in (
            padded[:, :-2, 1:-1],
            padded[:, 2:, 1:-1],
            padded[:, 1:-1, :-2],
            padded[:, 1:-1, 2:],
        ):
            touches |= neighbour != center
        expected = {
            "errors": len(wrong),
            "negatives": sum(s for _, _, s in wrong),
            "errors_at_boundary": touches[region >= 0].double().mean().item(),
            "classes": len(anchors[name]),
            "positive_similarity": sum(same).item() / len(same),
            "negative_similarity": sum(different).item() / len(different),
        }
        for quantity, value in expected.items():
            found = statistics[f"contrast/{name}/{quantity}"]
            assert found.item() == pytest.approx(value), (name, quantity)
            assert found.dim() == 0 and not found.requires_grad
        assert 0 < expected["errors_at_boundary"] < 1 or name != "res2"
    assert len(statistics) == 6 * len(LAYERS)


# ---- the parts of Contextrast++


def test_adaptive_fusion_begins_as_the_static_mixture() -> None:
    features, scores, labels = random_batch()
    static, adaptive = build(deepest_weight=0.3), build(deepest_weight=0.3, fusion="adaptive")
    adaptive.load_state_dict(static.state_dict(), strict=False)
    expected = run(static, features, scores, labels).losses
    torch.testing.assert_close(run(adaptive, features, scores, labels).losses, expected)


def test_adaptive_fusion_attends_to_existing_classes_only() -> None:
    fusion = AdaptiveFusion(WIDTH, 2)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    own, deepest = torch.randn(2, 4, WIDTH), torch.randn(4, WIDTH)
    exists = torch.tensor([[True, True, False, True], [True, False, True, True]])
    exists_deepest = torch.tensor([False, True, True, True])
    expected = fusion(own, deepest, exists, exists_deepest)
    # Equation by equation, for class 3 of layer 1: softmax(q k / sqrt D) v of the classes there.
    refined = []
    for attention, x, there in (
        (fusion.own[1], own[1], [0, 2, 3]),
        (fusion.deepest[1], deepest, [1, 2, 3]),
    ):
        scores = torch.stack(
            [attention.query(x[3]) @ attention.key(x[n]) / WIDTH**0.5 for n in there]
        )
        weights = scores.exp() / scores.exp().sum()
        refined.append(
            x[3] + sum(w * attention.value(x[n]) for w, n in zip(weights, there, strict=True))
        )
    torch.testing.assert_close(fusion.mix[1](torch.cat(refined)), expected[1, 3])
    changed = own.clone()
    changed[0, 2], changed[1, 1] = 100.0, -100.0
    found = fusion(changed, deepest, exists, exists_deepest)
    torch.testing.assert_close(found[exists], expected[exists], rtol=0, atol=0)
    assert not torch.equal(fusion(own, deepest.roll(1, 0), exists, exists_deepest), expected)


def test_every_parameter_of_the_fusion_learns() -> None:
    features, scores, labels = random_batch()
    contrast = build(fusion="adaptive")
    unzero_fusion(contrast)
    found = gradients(sum(run(contrast, features, scores, labels).losses.values()), contrast)
    # A shift of all keys alike is no change of a softmax.
    unmoved = {name for name, g in found.items() if not (g.abs() > 1e-9).any()}
    assert unmoved <= {name for name in found if name.endswith("key.bias")}


def test_parameters_are_those_that_the_papers_report() -> None:
    channels = {"s4": 48, "s8": 96, "s16": 192, "s32": 384}
    contrast = Contextrast(
        MultiScaleProjector(channels, 256, num_hidden=1),
        19,
        layers={"s4": 0.1, "s8": 0.3, "s16": 0.7, "s32": 1.0},
        fusion="adaptive",
        anchor_memory=100,
    )
    assert sum(p.numel() for p in contrast.projector.parameters()) == 382_624
    assert sum(p.numel() for p in contrast.fusion.parameters()) == 1_578_240
    assert contrast.memory.anchors.shape == (19, 100, 256)


def test_the_memory_is_first_in_first_out() -> None:
    memory = AnchorMemory(num_classes=3, embed_dim=2, size=4)
    expected: dict[int, list[float]] = {0: [], 1: [], 2: []}
    value = 0.0
    for step in range(9):
        rows = 1 + step % 3  # processes
        anchors = torch.zeros(rows, 3, 2)
        exists = torch.rand(rows, 3) < torch.tensor([0.9, 0.5, 0.0])
        for row in range(rows):
            for n in range(3):
                value += 1
                anchors[row, n] = value
                if exists[row, n]:
                    expected[n].append(value)
        memory.push(anchors, exists)
        for n, values in expected.items():
            assert memory.fills[n] == min(len(values), 4)
            assert memory.pointers[n] == len(values) % 4
            kept = [(i % 4, v) for i, v in enumerate(values)][-4:]
            for slot, v in kept:
                assert memory.anchors[n, slot].tolist() == [v, v]
    assert len(expected[0]) > 8 and not expected[2]
    # As many of each class as the least filled one has, the newest; class 2 has none.
    memory.fills[1] = 2
    contrast, labels = memory.contrast_set()
    assert sorted(labels.tolist()) == [-1] * 8 + [0, 0, 1, 1]
    for n in (0, 1):
        assert sorted(contrast[labels == n][:, 0].tolist()) == expected[n][-2:]


def test_the_memory_keeps_out_what_is_not_finite() -> None:
    memory = AnchorMemory(num_classes=2, embed_dim=2, size=2)
    anchors = torch.ones(1, 2, 2)
    anchors[0, 1, 1] = math.inf
    memory.push(anchors, torch.ones(1, 2, dtype=torch.bool))
    assert memory.fills.tolist() == memory.pointers.tolist() == [1, 0]
    assert not memory.anchors[1].any()


def test_more_processes_than_slots_are_named() -> None:
    memory = AnchorMemory(num_classes=2, embed_dim=2, size=2)
    with pytest.raises(ValueError, match="3 processes push.*memory of 2"):
        memory.push(torch.ones(3, 2, 2), torch.ones(3, 2, dtype=torch.bool))


def test_anchors_are_contrasted_with_those_of_past_steps() -> None:
    torch.manual_seed(5)
    contrast = build(anchor_memory=2, weight=0.2, temperature=0.3).double()
    past: dict[int, list[Tensor]] = {n: [] for n in range(NUM_CLASSES)}
    for step in range(4):
        features, scores, labels = random_batch()
        if step == 1:
            labels[labels == 1] = 255
        features = double(features)
        loss = run(contrast, features, scores, labels).losses["loss_contrast_anchors"]
        arguments = {"fraction": 0.5, "error_map": "false_negatives", "seed": 1}
        maps = contrast.projector(features)
        layers = references_contextual.read_pixels(maps, scores, labels, NUM_CLASSES, **arguments)
        anchors = references_contextual.mixed_anchors(layers, NUM_CLASSES)
        # From the deepest layer that has the class: class 3 is gone at stride 16.
        current = {**anchors["res2"], **anchors["res3"], **anchors["res5"]}
        assert set(current) == ({0, 2, 3} if step == 1 else {0, 1, 2, 3})
        number = min([len(kept) for kept in past.values() if kept], default=0)
        contrast_set = [(z, n) for n, kept in past.items() for z in kept[len(kept) - number :]]
        expected = references.cross_loss(
            torch.stack(list(current.values())),
            list(current),
            torch.stack([z for z, _ in contrast_set]) if number else torch.zeros(0, WIDTH),
            [n for _, n in contrast_set],
            0.3,
        )
        torch.testing.assert_close(loss, 0.2 * expected, rtol=1e-9, atol=0)
        assert (loss > 0) == (step > 0)
        found = torch.autograd.grad(loss, list(features.values()), allow_unused=True)
        wanted = torch.autograd.grad(0.2 * expected, list(features.values()), allow_unused=True)
        for g, w in zip(found, wanted, strict=True):
            w = torch.zeros_like(g) if w is None else w
            torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-12)
        for n, anchor in current.items():
            past[n] = [*past[n], anchor.detach()][-2:]


# ---- degenerate crops


@pytest.mark.parametrize("options", [{}, PLUS, {"negatives": "false_positives"}])
@pytest.mark.parametrize("case", ["all ignored", "perfect", "one class", "one pixel"])
def test_nothing_to_contrast_gives_zeros(options: dict, case: str) -> None:
    features, scores, labels = random_batch()
    features = {name: f.requires_grad_() for name, f in features.items()}
    if case == "perfect":
        scores = perfect_scores(labels)
        # At strides where a resized score would be a mixture of classes, too.
        labels = downsample_labels(labels, (4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
        scores = perfect_scores(labels)[:, :, ::16, ::16]
        scores = scores.repeat_interleave(4, 2).repeat_interleave(4, 3)
        features = {n: f[..., :4, :4].detach().requires_grad_() for n, f in features.items()}
    else:
        labels[:] = 2 if case == "one class" else 255
        if case == "one pixel":
            labels[0, 0, 0] = 1
        scores = torch.randn_like(scores)
    contrast = build(**options)
    output = run(contrast, features, scores, labels)
    assert all(loss == 0 for loss in output.losses.values())
    found = gradients(sum(output.losses.values()), contrast)
    found.update({name: f.grad for name, f in features.items()})
    for name, gradient in found.items():
        assert gradient is not None and not gradient.any(), name
    classes = {"all ignored": 0, "perfect": 3, "one class": 1, "one pixel": 1}[case]
    assert output.statistics["contrast/res2/classes"] == classes
    assert all(buffer.isfinite().all() for buffer in contrast.buffers())


def test_an_ignored_image_changes_nothing() -> None:
    features, scores, labels = random_batch(num_images=3)
    labels[1] = 255
    contrast = build(norm="layer", boundary_fraction=1.0).double()
    features = double(features)
    output = run(contrast, features, scores, labels)
    kept = [0, 2]
    expected = run(contrast, {n: f[kept] for n, f in features.items()}, scores[kept], labels[kept])
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=0)
    sum(output.losses.values()).backward()
    for f in features.values():
        assert not f.grad[1].any() and f.grad[0].any()


def test_lengths_of_embeddings() -> None:
    labels = torch.zeros(2, 3, 4, dtype=torch.long)
    maps = torch.randn(2, 40, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 12, dtype=torch.float64)
    found = layer_pixels(maps, labels, 1).inverse_lengths
    expected = 1 / maps.flatten(2).norm(dim=1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), maps),
        torch.autograd.grad((expected * weights).sum(), maps),
    )
    # A vector of zeros stays one, and its gradient finite.
    zeros = torch.zeros(1, 40, 3, 4, requires_grad=True)
    found = layer_pixels(zeros, labels[:1], 1).inverse_lengths
    torch.testing.assert_close(found, torch.full((1, 12), 1e12))
    (1e4 * found.sum()).backward()
    assert not zeros.grad.any()


def test_second_derivatives_are_refused() -> None:
    features, scores, labels = random_batch()
    contrast = build()
    loss = sum(run(contrast, features, scores, labels).losses.values())
    with pytest.raises(RuntimeError, match="leave out create_graph"):
        torch.autograd.grad(loss, list(contrast.projector.parameters()), create_graph=True)


@pytest.mark.parametrize("temperature", [1e-3, 10.0])
def test_losses_stay_finite_at_any_temperature(temperature: float) -> None:
    features, scores, labels = random_batch()
    contrast = build(temperature=temperature)
    output = run(contrast, features, scores, labels)
    assert all(loss.isfinite() and loss > 0 for loss in output.losses.values())
    found = gradients(sum(output.losses.values()), contrast)
    assert all(g.isfinite().all() and g.any() for g in found.values())


# ---- warm-up


@pytest.mark.parametrize("options", [{}, PLUS])
def test_warm_up(options: dict) -> None:
    features, scores, labels = random_batch()
    contrast = build(warmup_iters=2, ramp_iters=1, norm="layer", **options)
    reference = build(norm="layer", **options)
    reference.load_state_dict(contrast.state_dict(), strict=False)
    for step, factor in enumerate((0, 0, 0.5, 1, 1)):
        losses = run(contrast, features, scores, labels).losses
        expected = run(reference, features, scores, labels).losses
        assert list(losses) == list(expected)
        torch.testing.assert_close(losses, {n: factor * v for n, v in expected.items()})
        found = gradients(sum(losses.values()), contrast)
        assert all(g is not None for g in found.values())
        assert any(g.any() for g in found.values()) == (factor > 0)
        if options:
            # The memory is filled from the first pass on.
            assert contrast.memory.fills.tolist() == [min(step + 1, 3)] * 4 + [0]
            torch.testing.assert_close(contrast.memory.anchors, reference.memory.anchors)


# ---- as a module


def test_maps_that_are_no_layer_have_no_projector() -> None:
    contrast = build(layers={"res3": 0.5, "res5": 1.0})
    assert set(contrast.projector.heads) == {"res3", "res5"}
    features, scores, labels = random_batch()
    del features["res2"]
    losses = run(contrast, features, scores, labels).losses
    assert list(losses) == ["loss_contrast_res3", "loss_contrast_res5"]
    assert all(g.any() for g in gradients(sum(losses.values()), contrast).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, PLUS])
def test_autocast(dtype: torch.dtype, options: dict) -> None:
    features, scores, labels = random_batch()
    contrast = build(**options)
    run(contrast, features, scores, labels)
    twin = copy.deepcopy(contrast)
    plain = run(twin, features, scores, labels).losses
    reference = gradients(sum(plain.values()), twin)
    with torch.autocast("cpu", dtype=dtype):
        losses = run(contrast, features, scores.to(dtype), labels).losses
    found = gradients(sum(losses.values()), contrast)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[name], rtol=0.1, atol=0)
    for name, gradient in found.items():
        assert gradient.isfinite().all() and gradient.dtype == torch.float32
        if reference[name].abs().max() > 1e-6:
            cosine = torch.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0)
            assert cosine > 0.8, name  # kinks of the ReLUs turn it to 0.95


def test_similarities_are_not_rounded_by_autocast() -> None:
    features, scores, labels = random_batch()
    contrast = build(**PLUS)
    unzero_fusion(contrast)
    maps = {name: x.detach() for name, x in contrast.projector(features).items()}
    expected = run_maps(copy.deepcopy(contrast), maps, scores, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run_maps(contrast, maps, scores, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_a_resumed_run_continues_with_the_same_memory() -> None:
    features, scores, labels = random_batch()
    options = {"norm": "layer", "warmup_iters": 1, "ramp_iters": 4, **PLUS}
    contrast = build(**options)
    for _ in range(2):
        run(contrast, features, scores, labels)
    resumed = build(**options)
    resumed.load_state_dict(copy.deepcopy(contrast.state_dict()), strict=True)
    for seed in (3, 4):
        expected = run(contrast, features, scores, labels, seed)
        assert run(resumed, features, scores, labels, seed) == expected
        assert expected.losses["loss_contrast_anchors"] > 0
    for value, other in zip(
        resumed.state_dict().values(), contrast.state_dict().values(), strict=True
    ):
        assert value.equal(other)


def test_the_generator_fixes_the_step() -> None:
    features, scores, labels = random_batch()
    contrast = build(extra_negatives=5)
    losses = [run(contrast, features, scores, labels, seed).losses for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_compiled_step_breaks_its_graph_once() -> None:
    features, scores, labels = random_batch()
    contrast = build(**PLUS)
    expected = run(copy.deepcopy(contrast), features, scores, labels).losses
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(contrast, backend="aot_eager")
    losses = run(compiled, features, scores, labels).losses
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(losses, expected)
    found = gradients(sum(losses.values()), contrast)
    assert all(g is not None and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("options", [{}, PLUS, {"extra_negatives": 9}])
def test_the_host_never_waits(options: dict) -> None:
    features, scores, labels = random_batch()
    contrast = build(**options)
    run(contrast, features, scores, labels)
    with HostWaits() as waits:
        output = contrast(features, scores, labels)
        sum(output.losses.values()).backward()
    assert waits.calls == []


@pytest.mark.gpu
def test_the_host_never_waits_for_the_gpu() -> None:
    features, scores, labels = random_batch()
    features = {name: f.cuda() for name, f in features.items()}
    scores, labels, contrast = scores.cuda(), labels.cuda(), build(extra_negatives=9, **PLUS).cuda()

    def step() -> None:
        sum(contrast(features, scores, labels).losses.values()).backward()

    assert gpu_waits(step) == 0


@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type(labels_dtype: torch.dtype) -> None:
    features, scores, labels = random_batch()
    contrast = build(norm="layer")
    expected = run(contrast, features, scores, labels).losses
    assert run(contrast, features, scores, labels.to(labels_dtype)).losses == expected


def test_the_memory_format_of_features_does_not_matter() -> None:
    features, scores, labels = random_batch()
    contrast = build(norm="layer").double()
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        inputs = {
            name: f.double().contiguous(memory_format=memory_format).requires_grad_()
            for name, f in features.items()
        }
        losses = run(contrast, inputs, scores, labels).losses
        sum(losses.values()).backward()
        results.append((losses, [f.grad for f in inputs.values()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-13)


def test_sizes_that_do_not_divide() -> None:
    features, _, _ = random_batch(num_images=1)
    labels = torch.zeros(1, 61, 67, dtype=torch.long)
    labels[:, 30:] = 1
    scores = perfect_scores(labels)[:, :, ::3, ::5]
    scores[:, :, :3] = scores[:, :, -3:]
    statistics = run(build(), features, scores, labels).statistics
    for name in CHANNELS:
        assert statistics[f"contrast/{name}/classes"] == 2
        assert statistics[f"contrast/{name}/errors"] > 0


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"weight": -0.1}, "weight=-0.1: must be above 0"),
        ({"weight": math.nan}, "weight=nan"),
        ({"layers": {}}, "layers={}: name at least one"),
        ({"layers": {"res2": 0.0}}, r"layers\['res2'\]=0.0: must be above 0"),
        ({"layers": {"res1": 1.0}}, "'res1'.*Did you mean 'res"),
        ({"deepest_weight": 1.5}, "deepest_weight=1.5: must be from 0 to 1"),
        ({"boundary_fraction": 0.0}, "fraction=0.0"),
        ({"negatives": "all"}, "negatives='all': choose one of"),
        ({"extra_negatives": -1}, "extra_negatives=-1: needs at least 0"),
        ({"min_pixels": 0}, "min_pixels=0: needs at least 1"),
        ({"fusion": "learned"}, "fusion='learned': choose one of"),
        ({"fusion": "adaptive", "layers": {"res5": 1.0}}, "fusion='adaptive' with the one layer"),
        ({"anchor_memory": -1}, "anchor_memory=-1: needs at least 0"),
        ({"warmup_iters": -1}, r"Warmup\(start=-1\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_missing_class_scores_are_named() -> None:
    features, scores, labels = random_batch()
    with pytest.raises(ValueError, match=r"needs \(B, 5, h', w'\) class scores, got None"):
        build()(features, None, labels)
    with pytest.raises(ValueError, match=r"got \(2, 4, 16, 16\)"):
        build()(features, scores[:, :4], labels)
