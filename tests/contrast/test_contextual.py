"""Contextrast. Shape letters: I layers, B images, K classes, D embedding width."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import (
    Batch,
    Contextrast,
    ContextrastPlus,
    ContrastOutput,
    MultiScaleProjector,
    boundary_negatives,
    class_anchors,
    downsample_labels,
    evaluate,
)
from contrast_d2.contrast.class_anchors import class_means, layer_pixels
from contrast_d2.contrast.contextual_plus import AdaptiveFusion

from . import references, references_contextual

CHANNELS = {"res2": 5, "res3": 6, "res5": 8}
STRIDES = {"res2": 4, "res3": 8, "res5": 16}
LAYERS = {"res2": 0.1, "res3": 0.4, "res5": 1.0}
NUM_CLASSES = 5
WIDTH = 6

# Features, labels and class scores.
Inputs = tuple[dict[str, Tensor], Tensor, Tensor]


def build(kind: type[Contextrast] = Contextrast, **arguments) -> Contextrast:
    """Three layers; `arguments` override the defaults."""
    projector = MultiScaleProjector(CHANNELS, WIDTH, num_hidden=1, norm="layer")
    contrast = kind(projector, NUM_CLASSES, **{"layers": LAYERS, **arguments})
    if isinstance(contrast, ContextrastPlus):
        for name, parameter in contrast.fusion.named_parameters():
            if ".value." in name:  # which training would have moved away from zero
                torch.nn.init.normal_(parameter, std=0.3)
    return contrast


def random_inputs(num_images: int = 2, size: int = 32) -> Inputs:
    """Inputs in float64. Class 3 is missing at stride 16, class 4 everywhere."""
    features = {
        name: torch.randn(num_images, c, size // STRIDES[name], size // STRIDES[name]).double()
        for name, c in CHANNELS.items()
    }
    patches = torch.tensor([0, 1, 2, 255])[torch.randint(4, (num_images, size // 8, size // 8))]
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, 8:16, 8:16] = 3
    coarse = torch.randn(num_images, NUM_CLASSES, size // 16, size // 16)
    scores = F.interpolate(coarse, scale_factor=4, mode="bilinear")
    truth = downsample_labels(labels, scores.shape[-2:])
    scores += 1.5 * F.one_hot(truth % 255 % NUM_CLASSES, NUM_CLASSES).movedim(-1, 1)
    return {name: x.requires_grad_() for name, x in features.items()}, labels, scores


def perfect_scores(labels: Tensor) -> Tensor:
    return 9.0 * F.one_hot(labels % 255, NUM_CLASSES).movedim(-1, 1)


def run(contrast: Contextrast, inputs: Inputs, seed: int = 1) -> ContrastOutput:
    return contrast(*inputs, generator=torch.Generator().manual_seed(seed))


def run_maps(contrast: Contextrast, maps: dict, labels: Tensor, scores: Tensor) -> ContrastOutput:
    """A step with embeddings in place of features."""
    batch = Batch(maps, labels, scores, torch.Generator().manual_seed(1))
    output = evaluate(contrast.terms(batch), NUM_CLASSES)
    contrast.remember(batch)
    return output


# ---- the equations


def test_losses_and_gradients_are_those_of_the_equations() -> None:
    features, labels, scores = random_inputs()
    for negatives in ("other_classes", "false_positives", "own_class"):
        for options in (
            {},
            {"weight": 0.2, "temperature": 0.3, "deepest_weight": 0.7, "boundary_fraction": 1.0},
            {"temperature": 0.3, "boundary_fraction": 0.2},
        ):
            contrast = build(negatives=negatives, **options).double()
            losses = run(contrast, (features, labels, scores)).losses
            layers = references_contextual.read_pixels(
                contrast.projector(features),
                labels,
                scores,
                fraction=options.get("boundary_fraction", 0.5),
                error_map=negatives if negatives == "false_positives" else "false_negatives",
            )
            anchors = references_contextual.mixed_anchors(
                layers, NUM_CLASSES, options.get("deepest_weight", 0.5)
            )
            assert set(anchors["res2"]) == {0, 1, 2, 3} and 3 not in anchors["res5"]
            expected = {
                f"loss_contrast_{name}": options.get("weight", 0.1)
                * LAYERS[name]
                * references_contextual.pixel_anchor_loss(
                    anchors[name], layers[name], negatives, options.get("temperature", 0.1)
                )
                for name in LAYERS
            }
            assert list(losses) == list(expected) and losses["loss_contrast_res2"] > 0
            torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
            inputs = [*features.values(), *contrast.projector.parameters()]
            torch.testing.assert_close(
                torch.autograd.grad(sum(losses.values()), inputs),
                torch.autograd.grad(sum(expected.values()), inputs),
                rtol=1e-7,
                atol=1e-12,
            )


def test_statistics_are_those_of_the_layers() -> None:
    features, labels, scores = random_inputs()
    contrast = build().double()
    statistics = run(contrast, (features, labels, scores)).statistics
    maps = contrast.projector(features)
    layers = references_contextual.read_pixels(maps, labels, scores)
    anchors = references_contextual.mixed_anchors(layers, NUM_CLASSES)
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
        predicted = F.interpolate(scores, size=size, mode="bilinear").argmax(1)
        errors = boundary_negatives(downsample_labels(labels, size), predicted, NUM_CLASSES)
        at_boundary = errors.squared_distance[errors.region >= 0] == 1
        expected = {
            "errors": len(wrong),
            "negatives": sum(s for _, _, s in wrong),
            "errors_at_boundary": at_boundary.double().mean().item(),
            "classes": len(anchors[name]),
            "positive_similarity": sum(same).item() / len(same),
            "negative_similarity": sum(different).item() / len(different),
        }
        prefix = f"contrast/{name}/"
        found = {n: x.item() for n, x in statistics.items() if n.startswith(prefix)}
        assert found == pytest.approx({prefix + n: value for n, value in expected.items()})
        assert len(wrong) > expected["negatives"] > 0


def test_gradcheck() -> None:
    torch.manual_seed(3)
    labels, scores = torch.randint(0, NUM_CLASSES, (2, 4, 4)), torch.randn(2, NUM_CLASSES, 4, 4)
    maps = {
        name: torch.randn(2, WIDTH, *size, dtype=torch.float64, requires_grad=True)
        for name, size in {"res2": (4, 4), "res3": (4, 2), "res5": (2, 2)}.items()
    }
    contrast = build(ContextrastPlus, anchor_memory=4).double()
    run_maps(contrast, maps, labels, scores)  # anchors of another step to contrast with
    state = copy.deepcopy(contrast.memory.state_dict())

    def losses(*values: Tensor) -> Tensor:
        contrast.memory.load_state_dict(state)
        output = run_maps(contrast, dict(zip(maps, values, strict=True)), labels, scores)
        return torch.stack(list(output.losses.values()))

    noisy = [x.detach().add(0.3 * torch.randn_like(x)).requires_grad_() for x in maps.values()]
    assert (losses(*noisy) > 0).all()
    assert torch.autograd.gradcheck(losses, noisy, fast_mode=True)


def test_class_means_are_those_of_unit_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([0, 2, 5, 2, 255, -1])[torch.randint(6, (3, 3, 4))]
    maps = torch.randn(3, 40, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 40, dtype=torch.float64)
    units = F.normalize(maps, dim=1).permute(0, 2, 3, 1)
    sums = torch.stack([units[labels == c].sum(dim=0) for c in range(6)])
    expected = sums / torch.stack([(labels == c).sum().clamp(min=1) for c in range(6)])[:, None]

    def means_of(maps: Tensor) -> Tensor:
        batch = Batch({"a": maps}, labels)
        return class_means([layer_pixels(maps, labels, 6)], 6, batch).means[0]

    (gradient,) = torch.autograd.grad((expected * weights).sum(), maps)
    for elements in (1, 1 << 18):  # an image at a time, or all
        monkeypatch.setattr(class_anchors, "_CPU_ELEMENTS", elements)
        means = means_of(maps)
        torch.testing.assert_close(means, expected)
        (found,) = torch.autograd.grad((means * weights).sum(), maps)
        torch.testing.assert_close(found, gradient)
    # A vector of zeros has no direction, and its gradient is 0.
    zeros = torch.zeros(3, 40, 3, 4, requires_grad=True)
    means = means_of(zeros)
    (1e4 * means.sum()).backward()
    assert not means.any() and not zeros.grad.any()


# ---- cases of this method


def test_a_class_that_vanishes_keeps_its_own_anchor() -> None:
    labels = torch.full((1, 16, 16), 255)
    # Odd pixels, which strides of 2 and 4 do not read.
    labels[:, 1:8:2, 1::2] = 0
    labels[:, 9::2, 1::2] = 1
    scores = perfect_scores((labels + 1) % 256 % 2)
    maps = {
        name: torch.randn(1, WIDTH, 16 // s, 16 // s).double().requires_grad_()
        for name, s in {"res2": 1, "res3": 2, "res5": 4}.items()
    }
    mixed, own = build(deepest_weight=0.9).double(), build(deepest_weight=0.0).double()

    def finest(contrast: Contextrast) -> Tensor:
        return run_maps(contrast, maps, labels, scores).losses["loss_contrast_res2"]

    loss = finest(mixed)
    assert loss == finest(own) and loss > 0
    loss.backward()
    assert maps["res2"].grad.any() and not maps["res5"].grad.any()
    # Where the deepest layer has them, its anchors count.
    labels[:, ::4, ::4] = labels[:, 1::4, 1::4]
    assert finest(mixed) != finest(own)


def test_neither_the_order_of_images_nor_an_ignored_one_matters() -> None:
    features, labels, scores = random_inputs(num_images=4)
    labels[3] = 255
    for kind in (Contextrast, ContextrastPlus):
        contrast = build(kind).double()
        contrast.boundary_fraction = 1.0  # chance plays no part
        results = []
        for order in ([0, 1, 2, 3], [2, 0, 3, 1], [1, 0, 2]):
            module = copy.deepcopy(contrast)
            for _ in range(2):  # the second pass has anchors to contrast with
                ordered = {n: x[order] for n, x in features.items()}
                output = run(module, (ordered, labels[order], scores[order]))
            assert all(loss > 0 for loss in output.losses.values())
            statistics = {**output.statistics, "contrast/ignored_share": torch.zeros(())}
            output = output._replace(statistics=statistics)
            wanted = [*features.values(), *module.parameters()]
            results.append((output, torch.autograd.grad(sum(output.losses.values()), wanted)))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-13)


def test_no_negatives_or_a_single_pixel_give_zeros() -> None:
    features, labels, _ = random_inputs()
    right = downsample_labels(labels, (2, 2)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    single = torch.full_like(labels, 255)
    single[0, 0, 0] = 1
    for labels, scores in (
        # Nearest-neighbour scores: a mixture of two classes would be wrong somewhere.
        (right, perfect_scores(downsample_labels(right, (2, 2)))),
        (single, torch.randn(2, NUM_CLASSES, 8, 8)),
    ):
        same_size = {n: x[..., :2, :2] for n, x in features.items()}
        for kind in (Contextrast, ContextrastPlus):
            contrast = build(kind).double()
            losses = run(contrast, (same_size, labels, scores)).losses
            assert not any(losses.values())
            for gradient in torch.autograd.grad(
                sum(losses.values()), [*features.values(), *contrast.parameters()]
            ):
                assert not gradient.any()


def test_losses_stay_finite_at_any_temperature() -> None:
    inputs = random_inputs()
    inputs = ({n: x.detach().float() for n, x in inputs[0].items()}, *inputs[1:])
    for temperature in (1e-3, 10.0):
        contrast = build(temperature=temperature)
        losses = run(contrast, inputs).losses
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        for gradient in torch.autograd.grad(sum(losses.values()), list(contrast.parameters())):
            assert gradient.isfinite().all() and gradient.any()


def test_similarities_are_not_rounded_by_autocast() -> None:
    features, labels, scores = random_inputs()
    contrast = build(ContextrastPlus)
    maps = {n: torch.randn(2, WIDTH, *x.shape[-2:]) for n, x in features.items()}
    run_maps(contrast, maps, labels, scores)
    expected = run_maps(copy.deepcopy(contrast), maps, labels, scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_maps(contrast, maps, labels, scores)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=0)


def test_sizes_that_do_not_divide() -> None:
    features = random_inputs()[0]
    labels = torch.zeros(2, 29, 31, dtype=torch.long)
    labels[:, 12:] = 1
    scores = perfect_scores(labels)[:, :, ::3, ::3]
    scores[:, :, :3] = scores[:, :, -3:]
    statistics = run(build().double(), (features, labels, scores)).statistics
    for name in CHANNELS:
        assert statistics[f"contrast/{name}/classes"] == 2
        assert statistics[f"contrast/{name}/errors"] > 0


# ---- the parts of Contextrast++


def test_the_fusion_begins_as_the_static_mixture() -> None:
    inputs = random_inputs()
    static = build(deepest_weight=0.3).double()
    projector = MultiScaleProjector(CHANNELS, WIDTH, num_hidden=1, norm="layer")
    plus = ContextrastPlus(projector, NUM_CLASSES, layers=LAYERS, deepest_weight=0.3).double()
    plus.projector.load_state_dict(static.projector.state_dict())
    expected, found = run(static, inputs).losses, run(plus, inputs).losses
    torch.testing.assert_close({name: found[name] for name in expected}, expected)


def test_the_fusion_attends_to_existing_classes_only() -> None:
    fusion = AdaptiveFusion(WIDTH, 2)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    own, deepest = torch.randn(2, 4, WIDTH), torch.randn(4, WIDTH)
    exists = torch.tensor([[True, True, False, True], [True, False, True, True]])
    exists_deepest = torch.tensor([False, True, True, True])
    found = fusion(own, deepest, exists, exists_deepest)
    # Equation by equation: softmax(q k / sqrt D) v of the classes that exist.
    for layer, n in exists.nonzero().tolist():
        refined = []
        for attention, x, there in (
            (fusion.own[layer], own[layer], exists[layer].nonzero().flatten().tolist()),
            (fusion.deepest[layer], deepest, [1, 2, 3]),
        ):
            scores = [attention.query(x[n]) @ attention.key(x[m]) / WIDTH**0.5 for m in there]
            weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            values = [attention.value(x[m]) for m in there]
            refined.append(x[n] + sum(w * v for w, v in zip(weights, values, strict=True)))
        torch.testing.assert_close(fusion.mix[layer](torch.cat(refined)), found[layer, n])


def test_every_parameter_of_the_fusion_learns() -> None:
    contrast = build(ContextrastPlus).double()
    sum(run(contrast, random_inputs()).losses.values()).backward()
    for name, parameter in contrast.named_parameters():
        # A shift of all keys alike is no change of a softmax.
        assert (parameter.grad.abs() > 1e-9).any() != name.endswith("key.bias"), name


def test_parameters_are_those_that_the_papers_report() -> None:
    channels = {"s4": 48, "s8": 96, "s16": 192, "s32": 384}
    layers = {"s4": 0.1, "s8": 0.3, "s16": 0.7, "s32": 1.0}
    contrast = ContextrastPlus(MultiScaleProjector(channels, 256, num_hidden=1), 19, layers=layers)
    assert sum(p.numel() for p in contrast.projector.parameters()) == 382_624
    assert sum(p.numel() for p in contrast.fusion.parameters()) == 1_578_240
    assert contrast.memory.keys.shape == (19 * 100, 256)


def test_anchors_are_contrasted_with_those_of_past_steps() -> None:
    torch.manual_seed(5)
    contrast = build(ContextrastPlus, anchor_memory=2, weight=0.2, temperature=0.3).double()
    past: dict[int, list[Tensor]] = {n: [] for n in range(NUM_CLASSES)}
    for step in range(4):
        features, labels, scores = random_inputs()
        if step == 1:
            labels[labels == 1] = 255
        loss = run(contrast, (features, labels, scores)).losses["loss_contrast_anchors"]
        layers = references_contextual.read_pixels(contrast.projector(features), labels, scores)
        anchors = references_contextual.mixed_anchors(layers, NUM_CLASSES)
        # From the deepest layer that has the class: class 3 is gone at stride 16.
        current = {**anchors["res2"], **anchors["res3"], **anchors["res5"]}
        assert set(current) == ({0, 2, 3} if step == 1 else {0, 1, 2, 3})
        number = min([len(kept) for kept in past.values() if kept], default=0)
        contrast_set = [(z, n) for n, kept in past.items() for z in kept[len(kept) - number :]]
        expected = 0.2 * references.cross_loss(
            torch.stack(list(current.values())),
            list(current),
            torch.stack([z for z, _ in contrast_set]) if number else torch.zeros(0, WIDTH),
            [n for _, n in contrast_set],
            0.3,
        )
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        assert (loss > 0) == (step > 0)
        inputs = list(features.values())
        torch.testing.assert_close(
            torch.autograd.grad(loss, inputs, materialize_grads=True, allow_unused=True),
            torch.autograd.grad(expected, inputs, materialize_grads=True, allow_unused=True),
            rtol=1e-7,
            atol=1e-12,
        )
        for n, anchor in current.items():
            past[n] = [*past[n], anchor.detach()][-2:]


# ---- errors


def test_wrong_arguments_are_named() -> None:
    for kind, arguments, named in (
        (Contextrast, {"temperature": 0.0}, "temperature=0.0"),
        (Contextrast, {"weight": float("nan")}, "weight=nan"),
        (Contextrast, {"layers": {}}, "layers={}"),
        (Contextrast, {"layers": {"res2": 0.0}}, r"layers\['res2'\]=0.0"),
        (Contextrast, {"layers": {"res1": 1.0}}, "'res1'"),
        (Contextrast, {"deepest_weight": 1.5}, "deepest_weight=1.5"),
        (Contextrast, {"boundary_fraction": 0.0}, "fraction=0.0"),
        (Contextrast, {"negatives": "all"}, "negatives='all'"),
        (ContextrastPlus, {"layers": {"res5": 1.0}}, r"layers=\['res5'\]"),
        (ContextrastPlus, {"anchor_memory": 0}, "size=0"),
    ):
        with pytest.raises(ValueError, match=named):
            build(kind, **arguments)
