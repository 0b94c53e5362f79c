"""PNE. Shape letters: B images, K classes, D embedding width, A anchors, R samples."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import PNE, Batch, ContrastOutput, MultiScaleProjector, evaluate
from contrast_d2.contrast import log_ratios as log_ratios_module
from contrast_d2.contrast.log_ratios import Groups, Ranges, log_ratios

NUM_CLASSES = 4

# Embeddings, class scores and labels.
Inputs = tuple[Tensor, Tensor, Tensor]


def build(num_classes: int = NUM_CLASSES, **arguments) -> PNE:
    projector = MultiScaleProjector({"p2": 6, "res5": 3}, 6, num_hidden=0)
    return PNE(projector, num_classes, feature="p2", **{"max_hard": 1.0, **arguments})


def scores_of(predictions: Tensor, num_classes: int = NUM_CLASSES) -> Tensor:
    """Random class scores of which the given class is the highest."""
    scores = torch.rand(len(predictions), num_classes, *predictions.shape[1:])
    return scores.scatter_add(1, predictions[:, None], torch.ones_like(scores))


def random_inputs(num_images: int = 2, size: tuple[int, int] = (12, 16)) -> Inputs:
    """A third of the pixels is wrong, a tenth ignored."""
    shape = num_images, *size
    labels = torch.randint(NUM_CLASSES, shape)
    predictions = torch.where(torch.rand(shape) < 0.3, torch.randint(NUM_CLASSES, shape), labels)
    labels[torch.rand(shape) < 0.1] = 255
    return torch.randn(num_images, 6, *size), scores_of(predictions), labels


def rare_inputs() -> Inputs:
    """Three images in which groups lack positives, negatives, or the predicted class."""
    embeddings, scores, labels = random_inputs(3, (6, 8))
    predictions = scores.argmax(1)
    labels[0][(labels[0] == 2) & (predictions[0] == 2)] = 3  # class 2 always wrong,
    labels[0, :2][labels[0, :2] == 0] = 2  # mostly taken for class 0
    labels[1][labels[1] == 1] = 0  # class 1 predicted and absent
    return embeddings.double().requires_grad_(), scores.double(), labels


def line(pairs: list[tuple[int, int, int]]) -> Inputs:
    """One image of one row, with `n` pixels for each (n, predicted, true)."""
    predictions = torch.tensor([[[p for n, p, _ in pairs for _ in range(n)]]])
    labels = torch.tensor([[[t for n, _, t in pairs for _ in range(n)]]])
    return torch.randn(1, 6, *labels.shape[1:]), scores_of(predictions), labels


def run(pne: PNE, embeddings: Tensor, scores: Tensor, labels: Tensor, seed: int = 1):
    """A step with embeddings in place of features."""
    generator = torch.Generator().manual_seed(seed)
    batch = Batch({"p2": embeddings}, labels, scores, generator)
    return evaluate(pne.terms(batch), pne.num_classes)


def loss_of(*arguments, **options) -> Tensor:
    return run(*arguments, **options).losses["loss_contrast_p2"]


def values(output: ContrastOutput) -> dict[str, float]:
    return {n.removeprefix("contrast/p2/"): value.item() for n, value in output.statistics.items()}


def statistics_of(*arguments, **options) -> dict[str, float]:
    return values(run(*arguments, **options))


# ---- the equations, one group, anchor and pair after the other


def reference(
    embeddings: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    weight: float = 1.3,
    temperature: float = 1.0,
    samples_per_group: int = 100,
    max_hard: int = 10**6,
    official_code: bool = False,
) -> dict[str, Tensor]:
    """The loss in raster order, and statistics."""
    probabilities, predictions = scores.softmax(1), scores.argmax(1)
    groups, skips, num_wrong = [], Counter(), 0
    for image, (truth, guess) in enumerate(zip(labels, predictions, strict=True)):
        where: dict[tuple[int, int], list] = {}
        for y, x in itertools.product(*map(range, truth.shape)):
            if 0 <= truth[y, x] < NUM_CLASSES:
                where.setdefault((guess[y, x].item(), truth[y, x].item()), []).append((y, x))
        for (j, k), hard in where.items():
            if j == k:
                continue
            num_wrong += len(hard)
            if j not in {t for _, t in where}:
                skips["absent_prediction"] += len(hard)
            elif (k, k) not in where:
                skips["no_positives"] += len(hard)
            elif len(hard) > max_hard:
                skips["gate"] += len(hard)
            else:
                skips["no_negatives"] += (j, j) not in where  # the anchors stand in
                groups.append((image, k, hard, where[k, k], where.get((j, j), hard)))
    means, ratios, pulls = [], [], []
    for image, k, hard, positives, negatives in groups:

        def vector(pixel, image=image):
            return embeddings[image, :, pixel[0], pixel[1]]

        group = []
        for a in hard[:samples_per_group]:
            length = vector(a).norm()
            anchor = vector(a) / (length.detach() if official_code else length)
            pull, push = [], []
            for p in positives[:samples_per_group]:
                unit = F.normalize(vector(p).detach(), dim=0)
                w = probabilities[image, k, p[0], p[1]]
                pull.append(w * torch.exp(anchor @ unit / temperature))
            for n in negatives[:samples_per_group]:
                unit = F.normalize(vector(n).detach(), dim=0)
                push.append(torch.exp(anchor @ unit / temperature))
            ratio = (sum(push) / len(push)) / (sum(pull) / len(pull))
            group.append((torch.log(1 + ratio), torch.log(ratio), ratio / (1 + ratio)))
        for means_of, column in zip((means, ratios, pulls), zip(*group, strict=True), strict=True):
            means_of.append(sum(column) / len(column))
    total = sum(len(hard) for _, _, hard, _, _ in groups)
    weight = weight * total / len(groups) / samples_per_group
    return {
        "loss": weight * sum(means) / len(means),
        "without_negatives": skips["no_negatives"],
        "groups": len(groups),
        "wrong_pixels": num_wrong,
        "anchors": sum(min(samples_per_group, len(hard)) for _, _, hard, _, _ in groups),
        "group_size": total / len(groups),
        "weight": weight,
        "log_ratio": sum(ratios).item() / len(ratios),
        "pull": sum(pulls).item() / len(pulls),
        **{
            f"skipped_{reason}": skips[reason] / num_wrong
            for reason in ("absent_prediction", "no_positives", "gate")
        },
    }


def test_loss_gradient_and_statistics_are_those_of_the_equations() -> None:
    embeddings, scores, labels = rare_inputs()
    for options in (
        {},
        {"weight": 0.7, "temperature": 0.2},
        {"max_hard": 3},
        {"official_code": True},
        {"official_code": True, "samples_per_group": 3},
    ):
        expected = reference(embeddings, scores, labels, **options)
        output = run(build(**options), embeddings, scores, labels)
        losses = output.losses["loss_contrast_p2"], expected.pop("loss")
        assert expected.pop("without_negatives") > 0
        torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, embeddings)[0] for x in losses), rtol=1e-8, atol=1e-12
        )
        assert values(output) == pytest.approx(expected)
        assert expected["skipped_absent_prediction"] > 0.05 < expected["skipped_no_positives"]
        assert expected["groups"] > 5 and (expected["skipped_gate"] > 0) == ("max_hard" in options)


def tiled(vectors: Tensor, number: int) -> Tensor:
    assert number % len(vectors) == 0
    return vectors.repeat(number // len(vectors), 1)


def test_means_are_the_official_codes_sums_over_tiled_sets() -> None:
    # (wrong pixels as class 1, correct ones of class 0 and 1), each a divisor of 100; then another
    # group of class 1 taken for class 0.
    embeddings, scores, labels = line([(20, 1, 0), (50, 0, 0), (25, 1, 1), (4, 0, 1), (30, 2, 2)])
    embeddings, scores = embeddings.double(), scores.double()
    unit = F.normalize(embeddings[0, :, 0].T, dim=1)
    confidence = scores.softmax(1).amax(1).flatten()
    hard, zero, one, other = torch.arange(99).split([20, 50, 25, 4])
    total = 0.0
    for anchors, positives, negatives in ((hard, zero, one), (other, one, zero)):
        s_p = tiled(unit[anchors], 100) @ tiled(unit[positives], 100).T
        s_n = tiled(unit[anchors], 100) @ tiled(unit[negatives], 100).T
        w = tiled(confidence[positives, None], 100).T
        total += torch.log(1 + s_n.exp().sum(1) / (w * s_p.exp()).sum(1)).sum()
    expected = 1.3 * (24 / (2 * 100) ** 2) * total
    for official_code in (False, True):
        found = loss_of(build(official_code=official_code), embeddings, scores, labels)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ---- the pure function


def random_groups() -> tuple[Tensor, Tensor, Tensor, Groups]:
    """40 anchors in 3 groups, the largest of which takes several blocks."""
    anchors = F.normalize(torch.randn(40, 3, dtype=torch.float64), dim=1).requires_grad_()
    samples = F.normalize(torch.randn(25, 3, dtype=torch.float64), dim=1)
    groups = Groups(
        Ranges(torch.tensor([0, 33, 34]), torch.tensor([33, 1, 6])),
        Ranges(torch.tensor([0, 10, 3]), torch.tensor([4, 9, 1])),
        Ranges(torch.tensor([15, 2, 19]), torch.tensor([2, 8, 6])),
    )
    return anchors, samples, -torch.rand(19, dtype=torch.float64), groups


def test_gradcheck() -> None:
    anchors, *rest = random_groups()
    assert torch.autograd.gradcheck(
        lambda a: log_ratios(a, *rest, temperature=0.3, max_samples=9), anchors
    )


def test_pull_and_push_are_equal_and_the_nearest_positive_pulls_most() -> None:
    # Each sample is an axis, so that a component of the gradient is the weight of one sample.
    samples = torch.eye(7, dtype=torch.float64)
    anchor = F.normalize(torch.rand(1, 7, dtype=torch.float64), dim=1).requires_grad_()
    first, one, five, two = (torch.tensor([n]) for n in (0, 1, 5, 2))
    groups = Groups(Ranges(first, one), Ranges(first, five), Ranges(five, two))
    for log_weights in (-torch.rand(5).double(), torch.zeros(5).double()):
        ratio = log_ratios(anchor, samples, log_weights, groups, temperature=0.5, max_samples=6)
        (gradient,) = torch.autograd.grad(F.softplus(ratio).sum(), anchor)
        strength = ratio.detach().sigmoid() / 0.5
        torch.testing.assert_close(-gradient[0, :5].sum(), strength[0])
        torch.testing.assert_close(gradient[0, 5:].sum(), strength[0])
    # The last time without weights.
    assert gradient[0, :5].argmin() == anchor[0, :5].argmax()


def test_blocks_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, *rest = random_groups()

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        ratios = log_ratios(anchors, *rest, temperature=0.3, max_samples=9)
        slopes = torch.arange(40, dtype=torch.float64)
        return ratios, torch.autograd.grad((ratios * slopes).sum(), anchors)[0]

    expected = value_and_gradient()
    for block, chunk in itertools.product((1, 3, 16, 64), (1, 200, 1 << 22)):
        monkeypatch.setattr(log_ratios_module, "_BLOCK_ANCHORS", block)
        monkeypatch.setattr(log_ratios_module, "_CPU_CHUNK_ELEMENTS", chunk)
        torch.testing.assert_close(value_and_gradient(), expected)


def test_fp32_stays_near_fp64_at_any_temperature() -> None:
    anchors, samples, log_weights, groups = random_groups()
    single = anchors.detach().float().requires_grad_()
    for temperature in (1e-4, 1.0):
        options = {"temperature": temperature, "max_samples": 9}
        expected = log_ratios(anchors, samples, log_weights, groups, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = log_ratios(single, samples.float(), log_weights.float(), groups, **options)
        scaled = found.double() * temperature, expected * temperature
        torch.testing.assert_close(*scaled, rtol=0, atol=2e-6)
        (gradient,) = torch.autograd.grad(F.softplus(found).sum(), single)
        assert gradient.isfinite().all()


# ---- which pixels take part


def test_groups_that_are_too_large_do_not_count() -> None:
    inputs = line([(2, 0, 1), (5, 1, 0), (6, 2, 0), (29, 2, 1), (20, 0, 0), (20, 1, 1), (18, 2, 2)])
    assert inputs[2].numel() == 100
    for most, passing in (
        (5, [2, 5]),
        (4, [2]),
        # The float 0.29 * 100 is below 29.
        (0.29, [2, 5, 6, 29]),
        (0.289, [2, 5, 6]),
        (1, []),
        (1.0, [2, 5, 6, 29]),
    ):
        found = statistics_of(build(max_hard=most), *inputs)
        assert found["groups"] == len(passing)
        assert found["skipped_gate"] == pytest.approx((42 - sum(passing)) / 42)
        mean = sum(passing) / len(passing) if passing else math.nan
        assert found["group_size"] == pytest.approx(mean, nan_ok=True)
    # A fraction lets one pixel pass on the smallest maps.
    smallest = line([(1, 0, 1), (5, 0, 0), (6, 1, 1)])
    assert statistics_of(build(max_hard=199 / 8192), *smallest)["groups"] == 1


def test_the_default_gate_lets_199_of_64_times_128_pass() -> None:
    labels = torch.zeros(1, 64, 128, dtype=torch.long)
    labels[:, 32:] = 1
    pne = PNE(MultiScaleProjector({"p2": 4}, 6), 2, feature="p2")
    for number, groups in ((199, 1), (200, 0)):
        predictions = labels.clone()
        predictions.view(-1)[:number] = 1
        inputs = torch.randn(1, 6, 64, 128), scores_of(predictions, 2), labels
        found = statistics_of(pne, *inputs)
        assert (found["groups"], found["skipped_gate"]) == (groups, 1 - groups)


def test_ignored_pixels_play_no_part() -> None:
    embeddings, scores, labels = random_inputs()
    expected = loss_of(build(), embeddings, scores, labels)
    mask = labels == 255
    embeddings[mask[:, None].expand_as(embeddings)] = torch.nan
    scores[mask[:, None].expand_as(scores)] = torch.rand(int(mask.sum()) * NUM_CLASSES)
    for ignored in (255, NUM_CLASSES, -1):
        labels[mask] = ignored
        torch.testing.assert_close(loss_of(build(), embeddings, scores, labels), expected)


def test_the_order_of_images_and_classes_does_not_matter() -> None:
    embeddings, scores, labels = rare_inputs()
    images, classes = torch.tensor([2, 0, 1]), torch.tensor([2, 3, 1, 0])
    renamed = torch.cat([classes, torch.full((252,), 255)])[labels]
    permuted = embeddings[images], scores[images][:, classes.argsort()], renamed[images]
    torch.testing.assert_close(
        loss_of(build(), *permuted), loss_of(build(), embeddings, scores, labels)
    )


def test_many_classes() -> None:
    # Their pairs take more than 16 bits, in which (128, 0) of the second image is (0, 64) of the
    # first.
    embeddings, scores, labels = random_inputs()
    names = [0, 64, 128, 199]
    many = torch.full((2, 200, 12, 16), -20.0)
    many[:, names] = scores
    renamed = torch.tensor([*names, *[255] * 252])[labels]
    torch.testing.assert_close(
        loss_of(build(200), embeddings, many, renamed), loss_of(build(), embeddings, scores, labels)
    )


def test_resolutions_of_labels_and_scores() -> None:
    embeddings, scores, labels = random_inputs(2, (8, 10))
    expected = loss_of(build(), embeddings, scores, labels)
    # Every fourth pixel of the labels is read, whatever the others are.
    large = torch.full((2, 32, 40), 3)
    large[:, ::4, ::4] = labels
    assert loss_of(build(), embeddings, scores, large) == expected
    coarse = scores[..., ::2, ::2]
    resized = F.interpolate(coarse, size=(8, 10), mode="bilinear", align_corners=False)
    assert loss_of(build(), embeddings, coarse, large) == (
        loss_of(build(), embeddings, resized, labels)
    )


# ---- draws


def test_every_subset_is_equally_likely() -> None:
    # 2 of 5 pixels of the one role are drawn; each pair has a loss of its own.
    for role in range(3):
        sizes = [5 if role == other else 1 for other in range(3)]
        inputs = line([(sizes[0], 1, 0), (sizes[1], 0, 0), (sizes[2], 1, 1)])
        pne, raster = (build(samples_per_group=2, official_code=x) for x in (False, True))
        found = Counter(round(loss_of(pne, *inputs, seed=s).item(), 5) for s in range(200))
        assert len(found) == math.comb(5, 2)
        chi_squared = sum((n - 20) ** 2 / 20 for n in found.values())
        assert chi_squared < 27.9  # 9 degrees of freedom: exceeded once in a thousand
        assert loss_of(pne, *inputs, seed=1) == loss_of(pne, *inputs, seed=1)
        assert len({loss_of(raster, *inputs, seed=s).item() for s in range(5)}) == 1


# ---- degenerate crops


def test_nothing_to_contrast_gives_zeros() -> None:
    labels = torch.randint(NUM_CLASSES, (2, 12, 16))
    for predictions, truth in (
        (labels, labels),
        (torch.zeros_like(labels), torch.ones_like(labels)),
        ((labels + 1) % NUM_CLASSES, labels),
    ):
        embeddings = torch.randn(2, 6, 12, 16, requires_grad=True)
        output = run(build(), embeddings, scores_of(predictions), truth)
        loss = output.losses["loss_contrast_p2"]
        loss.backward()
        assert loss == 0 and not embeddings.grad.any()
        found = values(output)
        assert found["groups"] == found["weight"] == 0 and math.isnan(found["pull"])
        assert found["wrong_pixels"] == (predictions != truth).sum()


def test_embeddings_of_zeros_are_harmless() -> None:
    embeddings, scores, labels = random_inputs()
    for official_code in (False, True):
        zeros = torch.zeros_like(embeddings).requires_grad_()
        loss = loss_of(build(official_code=official_code), zeros, scores, labels)
        loss.backward()
        assert loss > 0 and zeros.grad.isfinite().all()


# ---- as a module


def test_a_step_projects_the_one_feature() -> None:
    features, scores, labels = random_inputs()
    pne = build()
    output = pne({"p2": features, "res3": features}, labels, scores)
    expected = loss_of(pne, pne.projector({"p2": features})["p2"], scores, labels)
    torch.testing.assert_close(output.losses["loss_contrast_p2"], expected)
    assert set(pne.projector.heads) == {"p2"}


def test_wrong_arguments_are_named() -> None:
    for arguments, named in (
        ({"num_classes": 1}, "num_classes=1"),
        ({"samples_per_group": 0}, "samples_per_group=0"),
        ({"weight": 0.0}, "weight=0.0"),
        ({"weight": math.nan}, "weight=nan"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_hard": 0}, "max_hard=0"),
        ({"max_hard": 199.0}, "max_hard=199.0"),
        ({"max_hard": 0.0}, "max_hard=0.0"),
    ):
        with pytest.raises(ValueError, match=named):
            build(**arguments)
