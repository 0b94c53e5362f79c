"""PNE. Shape letters: B images, K classes, D embedding width, A anchors, R samples."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import PNE, MultiScaleProjector
from contrast_d2.contrast import log_ratios as log_ratios_module
from contrast_d2.contrast.log_ratios import Groups, log_ratios
from contrast_d2.contrast.ranges import Ranges

from ..helpers import HostWaits

CHANNELS = 5
NUM_CLASSES = 4
TERM = "contrast/p2"


def build(num_classes: int = NUM_CLASSES, **arguments) -> PNE:
    projector = MultiScaleProjector({"p2": CHANNELS, "res5": 3}, 6, num_hidden=1, order="norm_relu")
    return PNE(projector, num_classes, feature="p2", **{"max_hard": 1.0, **arguments})


def scores_of(predictions: Tensor, num_classes: int = NUM_CLASSES) -> Tensor:
    """Random class scores of which the given class is the highest."""
    scores = torch.rand(len(predictions), num_classes, *predictions.shape[1:])
    return scores.scatter_add(1, predictions[:, None], torch.ones_like(scores))


def random_batch(num_images: int = 2, size: tuple[int, int] = (12, 16)) -> tuple[Tensor, ...]:
    """Embeddings, class scores with a third of the pixels wrong, and labels with ignored pixels."""
    shape = num_images, *size
    labels = torch.randint(NUM_CLASSES, shape)
    predictions = torch.where(torch.rand(shape) < 0.3, torch.randint(NUM_CLASSES, shape), labels)
    labels[torch.rand(shape) < 0.1] = 255
    return torch.randn(num_images, 6, *size), scores_of(predictions), labels


def line(pairs: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """One image of one row, with `n` pixels for each (n, predicted, true)."""
    predictions = torch.tensor([[[p for n, p, _ in pairs for _ in range(n)]]])
    labels = torch.tensor([[[t for n, _, t in pairs for _ in range(n)]]])
    return torch.randn(1, 6, *labels.shape[1:]), scores_of(predictions), labels


def call(pne: PNE, embeddings: Tensor, scores: Tensor | None, labels: Tensor, seed: int = 1):
    return pne.contrast({"p2": embeddings}, scores, labels, torch.Generator().manual_seed(seed))


def loss_of(*arguments, **options) -> Tensor:
    return call(*arguments, **options).losses["loss_contrast_p2"]


def statistics_of(*arguments, **options) -> dict[str, float]:
    statistics = call(*arguments, **options).statistics
    return {name.removeprefix(f"{TERM}/"): value.item() for name, value in statistics.items()}


# ---- the equations, one group, anchor and pair after the other


def reference(
    embeddings: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    weight: float = 1.3,
    temperature: float = 1.0,
    samples: int = 100,
    low: int = 1,
    high: int = 10**6,
    empty_negatives: str = "anchors",
    scale: str = "paper",
    confidence_weights: bool = True,
    detach_anchor_norm: bool = False,
    allow_absent_predictions: bool = False,
) -> dict[str, Tensor]:
    """The loss in raster order, and statistics."""
    probabilities, predictions = scores.softmax(1), scores.argmax(1)
    groups, skips, num_wrong = [], Counter(), 0
    for image, (truth, guess) in enumerate(zip(labels, predictions, strict=True)):
        where: dict[tuple[int, int], list] = {}
        for y, x in itertools.product(*map(range, truth.shape)):
            if 0 <= truth[y, x] < NUM_CLASSES:
                where.setdefault((guess[y, x].item(), truth[y, x].item()), []).append((y, x))
        classes = {t for _, t in where}
        for (j, k), hard in where.items():
            if j == k:
                continue
            num_wrong += len(hard)
            positives, negatives = where.get((k, k), []), where.get((j, j), [])
            if not negatives and empty_negatives == "anchors":
                negatives = hard
            elif not negatives and empty_negatives == "image":
                negatives = [p for (g, t), ps in where.items() if g == t != k for p in ps]
            if j not in classes and not allow_absent_predictions:
                skips["absent_prediction"] += len(hard)
            elif not positives:
                skips["no_positives"] += len(hard)
            elif not negatives:
                skips["no_negatives"] += len(hard)
            elif not low <= len(hard) <= high:
                skips["gate"] += len(hard)
            else:
                groups.append((image, k, hard, positives, negatives))
    means, ratios, pulls = [], [], []
    for image, k, hard, positives, negatives in groups:

        def vector(pixel, image=image):
            return embeddings[image, :, pixel[0], pixel[1]]

        group = []
        for a in hard[:samples]:
            length = vector(a).norm()
            anchor = vector(a) / (length.detach() if detach_anchor_norm else length)
            pull, push = [], []
            for p in positives[:samples]:
                unit = F.normalize(vector(p).detach(), dim=0)
                w = probabilities[image, k, p[0], p[1]] if confidence_weights else 1
                pull.append(w * torch.exp(anchor @ unit / temperature))
            for n in negatives[:samples]:
                unit = F.normalize(vector(n).detach(), dim=0)
                push.append(torch.exp(anchor @ unit / temperature))
            ratio = (sum(push) / len(push)) / (sum(pull) / len(pull))
            group.append((torch.log(1 + ratio), torch.log(ratio), ratio / (1 + ratio)))
        for means_of, values in zip((means, ratios, pulls), zip(*group, strict=True), strict=True):
            means_of.append(sum(values) / len(values))
    total = sum(len(hard) for _, _, hard, _, _ in groups)
    if scale == "paper":
        weight = weight * total / len(groups) / samples
    return {
        "loss": weight * sum(means) / len(means),
        "groups": len(groups),
        "wrong_pixels": num_wrong,
        "anchors": sum(min(samples, len(hard)) for _, _, hard, _, _ in groups),
        "group_size": total / len(groups),
        "weight": weight,
        "log_ratio": sum(ratios) / len(ratios),
        "pull": sum(pulls) / len(pulls),
        **{
            f"skipped_{reason}": skips[reason] / num_wrong
            for reason in ("absent_prediction", "no_positives", "no_negatives", "gate")
        },
    }


def rare_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Three images in which groups lack positives, negatives, or the predicted class."""
    embeddings, scores, labels = (x.double() for x in random_batch(3, (6, 8)))
    labels, predictions = labels.long(), scores.argmax(1)
    labels[0][(labels[0] == 2) & (predictions[0] == 2)] = 3  # class 2 always wrong,
    labels[0, :2][labels[0, :2] == 0] = 2  # mostly taken for class 0
    labels[1][labels[1] == 1] = 0  # class 1 predicted and absent
    return embeddings.requires_grad_(), scores, labels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "mean", "weight": 0.7, "temperature": 0.2},
        {"confidence_weights": False},
        {"detach_anchor_norm": True},
        {"empty_negatives": "skip"},
        {"empty_negatives": "image"},
        {"allow_absent_predictions": True},
        {"empty_negatives": "image", "allow_absent_predictions": True},
        {"samples": 3},
        {"low": 2, "high": 4},
    ],
    ids=str,
)
def test_loss_gradient_and_statistics_are_those_of_the_equations(options: dict) -> None:
    embeddings, scores, labels = rare_batch()
    expected = reference(embeddings, scores, labels, **options)
    names = {"samples": "samples_per_group", "low": "min_hard", "high": "max_hard"}
    pne = build(draw="raster", **{names.get(name, name): v for name, v in options.items()})
    actual = call(pne, embeddings, scores, labels)
    loss, expected_loss = actual.losses["loss_contrast_p2"], expected.pop("loss")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    gradient, expected_gradient = (
        torch.autograd.grad(x, embeddings)[0] for x in (loss, expected_loss)
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)
    found = {name.removeprefix(f"{TERM}/"): v for name, v in actual.statistics.items()}
    assert {name: v.item() for name, v in found.items()} == pytest.approx(
        {name: float(torch.as_tensor(v).detach()) for name, v in expected.items()}
    )
    assert not any(v.requires_grad or v.dim() for v in found.values())


def test_the_rare_batch_lacks_what_it_should() -> None:
    skip = statistics_of(build(empty_negatives="skip"), *rare_batch())
    for reason in ("absent_prediction", "no_positives", "no_negatives"):
        assert skip[f"skipped_{reason}"] > 0.05, reason
    assert skip["groups"] > 5


def tiled(vectors: Tensor, number: int) -> Tensor:
    assert number % len(vectors) == 0
    return vectors.repeat(number // len(vectors), 1)


@pytest.mark.parametrize("detach_anchor_norm", [False, True])
def test_means_are_the_releases_sums_over_tiled_sets(detach_anchor_norm: bool) -> None:
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
    pne = build(detach_anchor_norm=detach_anchor_norm)
    torch.testing.assert_close(
        loss_of(pne, embeddings, scores, labels), expected, rtol=1e-12, atol=0
    )


def test_pull_and_push_are_equal_and_the_nearest_positive_pulls_most() -> None:
    # Each sample is an axis, so that a component of the gradient is the weight of one sample.
    samples = torch.eye(7, dtype=torch.float64)
    anchor = F.normalize(torch.rand(1, 7, dtype=torch.float64), dim=1).requires_grad_()
    run = [torch.tensor([n]) for n in (0, 1, 5, 2)]
    groups = Groups(Ranges(run[0], run[1]), Ranges(run[0], run[2]), Ranges(run[2], run[3]))
    ratio = log_ratios(
        anchor, samples, -torch.rand(5).double(), groups, temperature=0.5, max_samples=6
    )
    F.softplus(ratio).sum().backward()
    strength = ratio.detach().sigmoid() / 0.5
    torch.testing.assert_close(-anchor.grad[0, :5].sum(), strength[0])
    torch.testing.assert_close(anchor.grad[0, 5:].sum(), strength[0])
    unweighted = log_ratios(
        anchor, samples, torch.zeros(5).double(), groups, temperature=0.5, max_samples=5
    )
    (gradient,) = torch.autograd.grad(unweighted, anchor)
    assert gradient[0, :5].argmin() == anchor[0, :5].argmax()


# ---- the pure function


def random_groups() -> tuple[Tensor, Tensor, Tensor, Groups]:
    """40 anchors in 3 groups, the largest of which takes several blocks."""
    anchors = F.normalize(torch.randn(40, 5, dtype=torch.float64), dim=1)
    samples = F.normalize(torch.randn(25, 5, dtype=torch.float64), dim=1)
    groups = Groups(
        Ranges(torch.tensor([0, 33, 34]), torch.tensor([33, 1, 6])),
        Ranges(torch.tensor([0, 10, 3]), torch.tensor([4, 9, 1])),
        Ranges(torch.tensor([15, 2, 19]), torch.tensor([2, 8, 6])),
    )
    return anchors, samples, -torch.rand(19, dtype=torch.float64), groups


def test_gradcheck() -> None:
    anchors, *rest = random_groups()
    anchors = anchors[:, :3].contiguous().requires_grad_()
    rest[0] = rest[0][:, :3].contiguous()
    assert torch.autograd.gradcheck(
        lambda a: log_ratios(a, *rest, temperature=0.3, max_samples=9), anchors
    )


@pytest.mark.parametrize("block", [1, 3, 16, 64])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 22])
def test_blocks_and_chunks_do_not_matter(monkeypatch, block: int, chunk: int) -> None:
    anchors, *rest = random_groups()
    anchors.requires_grad_()

    def value_and_gradient() -> tuple[Tensor, Tensor]:
        ratios = log_ratios(anchors, *rest, temperature=0.3, max_samples=9)
        slopes = torch.arange(40, dtype=torch.float64)
        return ratios, torch.autograd.grad((ratios * slopes).sum(), anchors)[0]

    expected = value_and_gradient()
    monkeypatch.setattr(log_ratios_module, "_BLOCK_ANCHORS", block)
    monkeypatch.setattr(log_ratios_module, "_CPU_CHUNK_ELEMENTS", chunk)
    torch.testing.assert_close(value_and_gradient(), expected)


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_every_anchor_is_in_one_block_of_its_group(monkeypatch, size: int) -> None:
    monkeypatch.setattr(log_ratios_module, "_BLOCK_ANCHORS", size)
    anchors = random_groups()[3].anchors
    groups, members = log_ratios_module._blocks(anchors, 40)
    found = [
        (member, group)
        for group, block in zip(groups.tolist(), members.tolist(), strict=True)
        for member in block
        if member < 40
    ]
    assert sorted(found) == [(a, 0 if a < 33 else 1 if a < 34 else 2) for a in range(40)]


@pytest.mark.parametrize("temperature", [1e-4, 1.0])
def test_fp32_stays_near_fp64(temperature: float) -> None:
    anchors, samples, log_weights, groups = random_groups()
    expected = log_ratios(
        anchors, samples, log_weights, groups, temperature=temperature, max_samples=9
    )
    single = anchors.float().requires_grad_()
    ratios = log_ratios(
        single,
        samples.float(),
        log_weights.float(),
        groups,
        temperature=temperature,
        max_samples=9,
    )
    torch.testing.assert_close(
        ratios.double() * temperature, expected * temperature, rtol=0, atol=2e-6
    )
    F.softplus(ratios).sum().backward()
    assert single.grad.isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    anchors, *rest = random_groups()
    ratios = log_ratios(anchors.requires_grad_(), *rest, temperature=1.0, max_samples=9)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        ratios.sum().backward(create_graph=True)


# ---- which pixels take part


def test_only_anchors_receive_a_gradient() -> None:
    embeddings, scores, labels = random_batch()
    wrong = (scores.argmax(1) != labels) & (labels < NUM_CLASSES)
    assert statistics_of(build(), embeddings, scores, labels)["skipped_gate"] == 0
    (gradient,) = torch.autograd.grad(
        loss_of(build(), embeddings.requires_grad_(), scores.requires_grad_(), labels), embeddings
    )
    assert torch.equal(gradient.abs().sum(1) > 0, wrong)


@pytest.mark.parametrize(("number", "groups"), [(199, 1), (200, 0)])
def test_the_default_gate_lets_199_of_64_times_128_pass(number: int, groups: int) -> None:
    labels = torch.zeros(1, 64, 128, dtype=torch.long)
    labels[:, 32:] = 1
    predictions = labels.clone()
    predictions.view(-1)[:number] = 1
    pne = PNE(MultiScaleProjector({"p2": 4}, 6), 2, feature="p2")
    embeddings = torch.randn(1, 6, 64, 128)
    found = statistics_of(pne, embeddings, scores_of(predictions, 2), labels)
    assert (found["groups"], found["skipped_gate"]) == (groups, 1 - groups)


@pytest.mark.parametrize(
    ("bounds", "passing"),
    [
        ({"max_hard": 5}, [2, 5]),
        ({"max_hard": 4}, [2]),
        ({"min_hard": 3, "max_hard": 6}, [5, 6]),
        ({"min_hard": 6, "max_hard": 6}, [6]),
        # Of 100 pixels. The float 0.29 * 100 is below 29, and 0.07 * 100 above 7.
        ({"max_hard": 0.29}, [2, 5, 6, 29]),
        ({"min_hard": 0.05, "max_hard": 0.06}, [5, 6]),
        ({"min_hard": 0.051, "max_hard": 0.289}, [6]),
        ({"max_hard": 1}, []),
        ({"max_hard": 1.0}, [2, 5, 6, 29]),
    ],
)
def test_bounds_of_group_sizes(bounds: dict, passing: list[int]) -> None:
    batch = line([(2, 0, 1), (5, 1, 0), (6, 2, 0), (29, 2, 1), (20, 0, 0), (20, 1, 1), (18, 2, 2)])
    assert batch[2].numel() == 100
    found = statistics_of(build(**bounds), *batch)
    assert found["groups"] == len(passing)
    assert found["skipped_gate"] == pytest.approx((42 - sum(passing)) / 42)
    assert found["group_size"] == pytest.approx(
        sum(passing) / len(passing) if passing else math.nan, nan_ok=True
    )


def test_a_fraction_lets_one_pixel_pass_on_the_smallest_maps() -> None:
    batch = line([(1, 0, 1), (5, 0, 0), (6, 1, 1)])
    assert statistics_of(build(max_hard=199 / 8192), *batch)["groups"] == 1


def test_a_group_of_too_many_counts_in_full_where_it_is_drawn_from() -> None:
    batch = line([(30, 0, 1), (5, 0, 0), (6, 1, 1)])
    found = statistics_of(build(samples_per_group=10), *batch)
    assert (found["anchors"], found["group_size"]) == (10, 30)
    assert found["weight"] == pytest.approx(1.3 * 30 / 10)


def test_stand_ins_of_all_classes_in_even_shares() -> None:
    # Class 1 taken for 2, of which no pixel is right. 60 pixels of class 0 and 20 of class 3 are.
    embeddings, scores, labels = line([(3, 2, 1), (9, 1, 1), (1, 0, 2), (60, 0, 0), (20, 3, 3)])
    embeddings[:] = 0
    embeddings[:, 0, :, :12] = 1  # class 1, right or wrong
    embeddings[:, 1, :, 12:73] = 1  # class 0: at a right angle
    embeddings[:, 0, :, 73:] = -1  # class 3: opposite
    pne = build(empty_negatives="image", samples_per_group=8, min_hard=2, confidence_weights=False)
    ratio = (6 * 1 + 2 * math.exp(-1)) / 8 / math.exp(1)
    for seed in range(5):
        found = statistics_of(pne, embeddings, scores, labels, seed=seed)
        assert (found["groups"], found["log_ratio"]) == (1, pytest.approx(math.log(ratio)))


def test_a_group_without_stand_ins_is_skipped() -> None:
    # Class 1 alone is right somewhere: nothing stands in for class 2.
    embeddings, scores, labels = line([(3, 2, 1), (9, 1, 1), (2, 1, 2)])
    output = call(build(empty_negatives="image"), embeddings.requires_grad_(), scores, labels)
    found = {name.removeprefix(f"{TERM}/"): v.item() for name, v in output.statistics.items()}
    assert found["groups"] == 0
    assert found["skipped_no_negatives"] == pytest.approx(3 / 5)
    assert found["skipped_no_positives"] == pytest.approx(2 / 5)
    loss = output.losses["loss_contrast_p2"]
    loss.backward()
    assert loss == 0 and not embeddings.grad.any()


@pytest.mark.parametrize("ignored", [255, NUM_CLASSES, -1])
def test_ignored_pixels_play_no_part(ignored: int) -> None:
    embeddings, scores, labels = random_batch()
    mask = labels == 255
    labels[mask] = ignored
    expected = loss_of(build(), embeddings, scores, labels)
    embeddings[mask[:, None].expand_as(embeddings)] = torch.nan
    scores[mask[:, None].expand_as(scores)] = torch.rand(int(mask.sum()) * NUM_CLASSES)
    torch.testing.assert_close(loss_of(build(), embeddings, scores, labels), expected)


def test_images_are_not_contrasted_with_each_other() -> None:
    embeddings, scores, labels = random_batch(2)
    pne = build(scale="mean")
    parts = [call(pne, *(x[i : i + 1] for x in (embeddings, scores, labels))) for i in range(2)]
    groups = [part.statistics[f"{TERM}/groups"] for part in parts]
    losses = [part.losses["loss_contrast_p2"] for part in parts]
    expected = sum(n * loss for n, loss in zip(groups, losses, strict=True)) / sum(groups)
    torch.testing.assert_close(loss_of(pne, embeddings, scores, labels), expected)


def test_the_order_of_images_and_classes_does_not_matter() -> None:
    embeddings, scores, labels = (x.clone() for x in rare_batch())
    scores, labels = scores.float(), labels.clone()
    expected = loss_of(build(empty_negatives="image"), embeddings, scores, labels)
    images, classes = torch.tensor([2, 0, 1]), torch.tensor([2, 3, 1, 0])
    renamed = torch.cat([classes, torch.full((252,), 255)])[labels]
    inverse = classes.argsort()
    actual = loss_of(
        build(empty_negatives="image"),
        embeddings[images],
        scores[images][:, inverse],
        renamed[images],
    )
    torch.testing.assert_close(actual, expected)


# ---- draws


def subsets(embeddings: Tensor, scores: Tensor, labels: Tensor, runs: int, **options) -> Counter:
    """How often each value of the loss came out."""
    pne = build(confidence_weights=False, scale="mean", **options)
    generator = torch.Generator().manual_seed(0)
    maps = {"p2": embeddings}
    return Counter(
        round(pne.contrast(maps, scores, labels, generator).losses["loss_contrast_p2"].item(), 5)
        for _ in range(runs)
    )


@pytest.mark.parametrize("role", ["anchors", "positives", "negatives"])
def test_every_subset_is_equally_likely(role: str) -> None:
    # 2 of 5 pixels of the one role are drawn; each pair has a loss of its own.
    sizes = {name: 5 if name == role else 1 for name in ("anchors", "positives", "negatives")}
    embeddings, scores, labels = line(
        [(sizes["anchors"], 1, 0), (sizes["positives"], 0, 0), (sizes["negatives"], 1, 1)]
    )
    found = subsets(embeddings, scores, labels, 600, samples_per_group=2)
    assert len(found) == math.comb(5, 2)
    chi_squared = sum((n - 60) ** 2 / 60 for n in found.values())
    assert chi_squared < 27.9  # 9 degrees of freedom: exceeded once in a thousand
    assert len(subsets(embeddings, scores, labels, 5, samples_per_group=2, draw="raster")) == 1


def test_raster_order_takes_the_first_pixels() -> None:
    embeddings, scores, labels = line([(9, 1, 0), (9, 0, 0), (9, 1, 1)])
    pne = build(draw="raster", samples_per_group=4, scale="mean")
    pixels = [i for first in (0, 9, 18) for i in range(first, first + 4)]
    few = (x[..., pixels] for x in (embeddings, scores, labels))
    torch.testing.assert_close(loss_of(pne, embeddings, scores, labels), loss_of(pne, *few))


def test_the_generator_fixes_the_step() -> None:
    batch, pne = random_batch(), build(samples_per_group=2)
    losses = [loss_of(pne, *batch, seed=seed) for seed in (1, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


# ---- degenerate crops


def nothing_to_contrast() -> dict[str, tuple[Tensor, Tensor]]:
    """Predictions and labels that make no group."""
    labels = torch.randint(NUM_CLASSES, (2, 12, 16))
    return {
        "perfect prediction": (labels, labels),
        "all ignored": (labels, torch.full_like(labels, 255)),
        "one class, right": (torch.full_like(labels, 1), torch.full_like(labels, 1)),
        "one class, wrong": (torch.full_like(labels, 0), torch.full_like(labels, 1)),
        "all wrong": ((labels + 1) % NUM_CLASSES, labels),
    }


@pytest.mark.parametrize("case", nothing_to_contrast())
@pytest.mark.parametrize("empty_negatives", ["anchors", "skip", "image"])
def test_nothing_to_contrast_gives_a_zero_with_a_graph(case: str, empty_negatives: str) -> None:
    predictions, labels = nothing_to_contrast()[case]
    pne = build(empty_negatives=empty_negatives)
    features = {"p2": torch.randn(2, CHANNELS, 12, 16, requires_grad=True)}
    output = pne(features, scores_of(predictions), labels)
    loss = output.losses["loss_contrast_p2"]
    assert loss.item() == 0
    loss.backward()
    for tensor in (*pne.parameters(), features["p2"]):
        assert tensor.grad is not None and not tensor.grad.any()
    assert output.statistics[f"{TERM}/groups"] == output.statistics[f"{TERM}/weight"] == 0
    assert output.statistics[f"{TERM}/pull"].isnan()
    wrong = (predictions != labels).sum() if case != "all ignored" else 0
    assert output.statistics[f"{TERM}/wrong_pixels"] == wrong


def test_embeddings_of_zeros_are_harmless() -> None:
    embeddings, scores, labels = random_batch()
    for detach in (False, True):
        zeros = torch.zeros_like(embeddings).requires_grad_()
        loss = loss_of(build(detach_anchor_norm=detach), zeros, scores, labels)
        loss.backward()
        assert loss > 0 and zeros.grad.isfinite().all()


# ---- as a module


def features_of(size: tuple[int, int] = (12, 16)) -> dict[str, Tensor]:
    return {"p2": torch.randn(2, CHANNELS, *size), "res3": torch.randn(2, 9, 4, 4)}


def step(pne: PNE, features: dict[str, Tensor], scores: Tensor, labels: Tensor, seed: int = 1):
    """The loss and the gradients of the parameters."""
    pne.zero_grad()
    output = pne(features, scores, labels, torch.Generator().manual_seed(seed))
    (loss,) = output.losses.values()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in pne.named_parameters()}


def test_only_the_head_of_the_feature_is_kept_and_all_of_it_learns() -> None:
    _, scores, labels = random_batch()
    pne = build()
    assert set(pne.projector.heads) == {"p2"}
    loss, found = step(pne, features_of(), scores, labels)
    assert loss > 0 and loss.dtype == torch.float32
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    _, scores, labels = random_batch()
    features, pne = features_of(), build(temperature=0.1)
    plain, reference_gradients = step(pne, features, scores, labels)
    with torch.autocast("cpu", dtype=dtype):
        rounded, found = step(pne, features, scores.to(dtype), labels)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=0.03, atol=0)
    for name, gradient in found.items():
        expected = reference_gradients[name].flatten()
        assert gradient.isfinite().all() and gradient.dtype == torch.float32
        if expected.norm() > 1e-6:  # a bias in front of a batch norm has none
            assert torch.cosine_similarity(gradient.flatten(), expected, dim=0) > 0.95, name


def test_scores_and_labels_at_other_resolutions() -> None:
    embeddings, scores, labels = random_batch(2, (8, 10))
    expected = loss_of(build(), embeddings, scores, labels)
    # Every fourth pixel of the labels is read, whatever the others are.
    large = torch.full((2, 32, 40), 3)
    large[:, ::4, ::4] = labels
    assert loss_of(build(), embeddings, scores, large) == expected
    coarse = scores[..., ::2, ::2]
    resized = F.interpolate(coarse, size=(8, 10), mode="bilinear", align_corners=False)
    assert loss_of(build(), embeddings, coarse, large) == loss_of(
        build(), embeddings, resized, large
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    embeddings, scores, labels = random_batch()
    expected = loss_of(build(), embeddings, scores, labels)
    assert loss_of(build(), embeddings, scores, labels.to(dtype)) == expected


def test_many_classes() -> None:
    # Their pairs take more than 16 bits, in which (128, 0) of the second image is (0, 64) of the
    # first.
    embeddings, scores, labels = random_batch()
    names = [0, 64, 128, 199]
    renamed = torch.tensor([*names, *[255] * 252])[labels]
    many = torch.full((2, 200, 12, 16), -20.0)
    many[:, names] = scores
    torch.testing.assert_close(
        loss_of(build(200), embeddings, many, renamed),
        loss_of(build(), embeddings, scores, labels),
    )


def test_warm_up() -> None:
    batch = random_batch()
    full = call(build(), *batch)
    pne = build(warmup_iters=2, ramp_iters=1)
    embeddings = batch[0].requires_grad_()
    for factor in (0, 0, 0.5, 1, 1):
        generator = torch.Generator().manual_seed(1)
        output = pne.contrast({"p2": embeddings}, *batch[1:], generator)
        drawn = not torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())
        assert drawn == (factor > 0)
        loss = output.losses["loss_contrast_p2"]
        torch.testing.assert_close(loss, factor * full.losses["loss_contrast_p2"])
        (gradient,) = torch.autograd.grad(loss, embeddings)
        assert gradient.any() == (factor > 0)
        assert list(output.statistics) == list(full.statistics)
        torch.testing.assert_close(
            output.statistics[f"{TERM}/weight"], factor * full.statistics[f"{TERM}/weight"]
        )


def test_state_dict_round_trip() -> None:
    _, scores, labels = random_batch()
    pne, other = build(warmup_iters=1), build(warmup_iters=1)
    for _ in range(2):
        before, _ = step(pne, features_of(), scores, labels)  # moves statistics, passes warm-up
    other.load_state_dict(copy.deepcopy(pne.state_dict()), strict=True)
    features = features_of()
    pne.eval(), other.eval()
    expected = step(pne, features, scores, labels)
    assert expected[0] > 0 and expected[0] != before
    torch.testing.assert_close(step(other, features, scores, labels), expected, rtol=0, atol=0)


@pytest.mark.parametrize("draw", ["random", "raster"])
@pytest.mark.parametrize("empty_negatives", ["anchors", "skip", "image"])
def test_a_step_waits_once_for_the_device(draw: str, empty_negatives: str) -> None:
    _, scores, labels = random_batch()
    pne, features = build(draw=draw, empty_negatives=empty_negatives), features_of()
    with HostWaits() as waits:
        output = pne(features, scores, labels)
        sum(output.losses.values()).backward()
    # How many groups, anchors and samples there are.
    assert waits.calls == ["tolist"]


def test_a_compiled_step_breaks_its_graph_once() -> None:
    _, scores, labels = random_batch()
    features, pne = features_of(), build()
    expected = step(copy.deepcopy(pne), features, scores, labels)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(pne, backend="aot_eager")
    output = compiled(features, scores, labels, torch.Generator().manual_seed(1))
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1
    torch.testing.assert_close(output.losses["loss_contrast_p2"].detach(), expected[0])


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1.*at least 2"),
        ({"samples_per_group": 0}, "samples_per_group=0.*at least 1"),
        ({"weight": 0.0}, "weight=0.0.*above 0"),
        ({"weight": math.nan}, "weight=nan"),
        ({"temperature": -1.0}, "temperature=-1.0.*above 0"),
        ({"empty_negatives": "none"}, "empty_negatives='none'.*'anchors', 'skip', 'image'"),
        ({"draw": "first"}, "draw='first'.*'random', 'raster'"),
        ({"scale": "sum"}, "scale='sum'.*'paper', 'mean'"),
        ({"max_hard": 0}, "max_hard=0.*at least 1 pixel"),
        ({"min_hard": -2}, "min_hard=-2.*at least 1 pixel"),
        ({"max_hard": 199.0}, "max_hard=199.0.*fraction of the map.*an int"),
        ({"max_hard": 0.0}, r"max_hard=0.0.*\(0, 1\]"),
        ({"min_hard": 10, "max_hard": 9}, "min_hard=10, max_hard=9.*no group"),
        ({"min_hard": 0.2, "max_hard": 0.1}, "min_hard=0.2, max_hard=0.1.*no group"),
        ({"allow_absent_predictions": True, "empty_negatives": "skip"}, "Choose 'image'"),
        ({"warmup_iters": -1}, "start=-1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_an_unknown_feature_is_named() -> None:
    with pytest.raises(ValueError, match="no projector for feature map 'p3'.*Did you mean 'p2'"):
        PNE(MultiScaleProjector({"p2": 5}, 6), 4, feature="p3")


def test_wrong_logits_are_named() -> None:
    embeddings, scores, labels = random_batch()
    with pytest.raises(ValueError, match="needs logits"):
        loss_of(build(), embeddings, None, labels)
    with pytest.raises(ValueError, match="logits of 4 classes with PNE.num_classes=5.*set num"):
        loss_of(build(5), embeddings, scores, labels)
