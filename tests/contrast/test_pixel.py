"""Pixel contrast against its equations. Shape letters: A anchors, K classes, D width."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from contrast_d2.contrast import (
    Batch,
    BoundaryNegatives,
    HardAnchorSampler,
    MemoryBank,
    MultiScaleProjector,
    PixelContrast,
    SemiHardPairs,
    downsample_labels,
)
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.structures import SegOutput

from ..helpers import run_processes
from . import references
from .test_pairs import EVERY

K, WIDTH = 4, 6
CHANNELS = {"res2": 5, "res3": 6}
BANK = {"regions_per_class": 3, "pixels_per_class": 8, "pixels_per_image": 3}


def build(*, memory: dict | None = None, num_hidden: int = 1, **options) -> PixelContrast:
    """Pixel contrast of few anchors; `memory` are arguments of a bank."""
    projector = MultiScaleProjector(CHANNELS, WIDTH, num_hidden=num_hidden)
    sampler = options.pop("sampler", HardAnchorSampler(K, max_per_group=8))
    bank = None if memory is None else MemoryBank(K, WIDTH, **{**BANK, **memory})
    return PixelContrast(projector, sampler, feature="res2", memory=bank, **options)


def random_batch(num_images: int = 2) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features at stride 4, labels, and scores at stride 8; class 3 is in one image alone."""
    features = {"res2": torch.randn(num_images, CHANNELS["res2"], 12, 12)}
    patches = torch.tensor([0, 1, 2, 255])[torch.randint(4, (num_images, 6, 6))]
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, 16:24, :16] = 3
    return features, labels, torch.randn(num_images, K, 6, 6)


def double(batch: tuple) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    features, labels, scores = batch
    return {n: f.double().requires_grad_() for n, f in features.items()}, labels, scores.double()


def run(contrast: PixelContrast, batch: tuple, seed: int = 1):
    return contrast(*batch, generator=torch.Generator().manual_seed(seed))


def loss_of(contrast: PixelContrast, batch: tuple, seed: int = 1) -> Tensor:
    return run(contrast, batch, seed).losses["loss_contrast_res2"]


def drawn(contrast: PixelContrast, batch: tuple) -> tuple:
    """Sets of anchors and negatives (or None), and keys, that a call with seed 1 contrasts."""
    generator = torch.Generator().manual_seed(1)
    seen = Batch(contrast.projector(batch[0]), *batch[1:], generator)
    anchors, wrong = contrast.sample(seen, ["res2"], contrast.sampler, contrast.negatives)
    keys = copy.deepcopy(contrast.memory).contrast_set(generator) if contrast.memory else None
    return anchors["res2"], wrong.get("res2"), keys


def assert_same(contrast: PixelContrast, batch: tuple, loss: Tensor, expected: Tensor) -> None:
    inputs = [*batch[0].values(), *contrast.parameters()]
    torch.testing.assert_close(
        [loss, *torch.autograd.grad(loss, inputs, retain_graph=True)],
        [expected, *torch.autograd.grad(expected, inputs)],
        rtol=1e-7,
        atol=1e-12,
    )


# ---- the equations


def test_loss_gradients_and_statistics_are_those_of_the_equations() -> None:
    for memory in (None, {}, {"max_keys": 16}, {"regions_per_class": 0}):
        contrast = build(weight=0.3, temperature=0.2, memory=memory).double()
        run(contrast, double(random_batch()))
        batch = double(random_batch())
        anchors, _, keys = drawn(contrast, batch)
        labels = anchors.labels.tolist()
        everything, classes = anchors.embeddings, list(labels)
        if keys is not None:
            whole = copy.deepcopy(contrast.memory).filled
            assert 0 < whole.sum() < len(contrast.memory.keys)  # partly filled
            everything = torch.cat([everything, keys.embeddings])
            classes += keys.labels.tolist()
            fill = contrast.memory.fill_fraction()
        expected = 0.3 * references.cross_loss(
            anchors.embeddings, labels, everything, classes, 0.2, lead=True
        )
        output = run(contrast, batch)
        assert_same(contrast, batch, output.losses["loss_contrast_res2"], expected)
        same, different = [], []
        for i, label in enumerate(labels):
            for j, other in enumerate(classes):
                if other >= 0 and i != j:
                    cosine = torch.dot(anchors.embeddings[i], everything[j]).item()
                    (same if label == other else different).append(cosine)
        found = {name: value.item() for name, value in output.statistics.items()}
        assert found.pop("contrast/ignored_share") > 0
        if memory is not None:
            assert found.pop("contrast/bank_fill") == fill > 0
        assert found == pytest.approx(
            {
                "contrast/res2/hard_share": anchors.draw.wrong.float().mean().item(),
                "contrast/res2/anchors": len(labels),
                "contrast/res2/classes": len(set(labels)),
                "contrast/res2/positive_similarity": sum(same) / len(same),
                "contrast/res2/negative_similarity": sum(different) / len(different),
            }
        )


def test_fp32_takes_the_same_anchors_and_keys() -> None:
    """By the kernel for which anchors come in the order of their classes, and keys do not."""
    contrast = build(memory={})
    twin = copy.deepcopy(contrast).double()
    for seed in range(3):
        batch = random_batch()
        loss, exact = loss_of(contrast, batch, seed), loss_of(twin, double(batch), seed)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_semi_hard_loss_equals_the_equations() -> None:
    contrast = build(memory={}, pairs=SemiHardPairs(0.3, **EVERY), temperature=0.2).double()
    run(contrast, double(random_batch()))
    batch = double(random_batch())
    anchors, _, keys = drawn(contrast, batch)
    everything = torch.cat([anchors.embeddings, keys.embeddings])
    classes = anchors.labels.tolist() + keys.labels.tolist()
    similarities = anchors.embeddings @ everything.T
    means = []
    for i, label in enumerate(anchors.labels.tolist()):
        columns = sorted(range(len(classes)), key=lambda j, i=i: similarities[i, j].item())
        positives = [j for j in columns if classes[j] == label and j != i]
        negatives = [j for j in columns if 0 <= classes[j] != label][::-1]
        positives = positives[: max(1, math.floor(0.3 * len(positives) + 0.5))]
        negatives = negatives[: max(1, math.floor(0.3 * len(negatives) + 0.5))]
        rows = [everything[n] for n in negatives]
        pairs = [
            references.pair_loss(anchors.embeddings[i], everything[j], rows, 0.2) for j in positives
        ]
        means.append(sum(pairs) / len(pairs))
    assert_same(contrast, batch, loss_of(contrast, batch), 0.1 * sum(means) / len(means))


def test_drawn_negatives_take_the_place_of_other_classes() -> None:
    for memory in (None, {}):
        negatives = BoundaryNegatives(K, max_negatives=30)
        contrast = build(negatives=negatives, weight=0.3, temperature=0.2, memory=memory).double()
        run(contrast, double(random_batch()))
        batch = double(random_batch())
        anchors, wrong, keys = drawn(contrast, batch)
        positives, classes = anchors.embeddings, anchors.labels.tolist()
        if keys is not None:
            positives, classes = (
                torch.cat([positives, keys.embeddings]),
                classes + keys.labels.tolist(),
            )
        expected = 0.3 * references.two_role_loss(
            anchors.embeddings,
            anchors.labels.tolist(),
            positives,
            wrong.embeddings,
            classes,
            wrong.labels.tolist(),
            0.2,
            among_themselves=True,
        )
        output = run(contrast, batch)
        assert_same(contrast, batch, output.losses["loss_contrast_res2"], expected)
        different = anchors.labels[:, None] != wrong.labels
        assert output.statistics["contrast/res2/negatives"] == 30
        torch.testing.assert_close(
            output.statistics["contrast/res2/negative_similarity"],
            (anchors.embeddings @ wrong.embeddings.T)[different].mean().detach(),
        )


def four_pixels() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Two pixels each of two classes; all predicted as class 0."""
    features = torch.zeros(1, CHANNELS["res2"], 2, 2)
    features[0, 0, 0] = 2.0
    features[0, 1, 1] = 3.0
    scores = torch.zeros(1, K, 2, 2)
    scores[:, 0] = 1
    return {"res2": features}, torch.tensor([[[0, 0], [1, 1]]]), scores


def identity(contrast: PixelContrast) -> PixelContrast:
    """The first channels are the embedding."""
    (conv,) = contrast.projector.heads["res2"]
    with torch.no_grad():
        conv.weight.copy_(torch.eye(WIDTH)[:, : CHANNELS["res2"], None, None])
        conv.bias.zero_()
    return contrast


def test_orthogonal_classes_in_closed_form() -> None:
    for temperature in (1.0, 0.1, 0.01):
        # One positive at similarity 1, two negatives at 0: softplus(log 2 - 1 / t).
        contrast = identity(build(num_hidden=0, weight=1.0, temperature=temperature))
        loss = loss_of(contrast, four_pixels()).item()
        assert loss == pytest.approx(math.log1p(2 * math.exp(-1 / temperature)), rel=1e-5)


def test_a_further_positive_changes_no_pair() -> None:
    # Other positives are in no denominator: a bank with one more key where an anchor is leaves the
    # pairs of the others alone, and its own pair is that of the first.
    losses = []
    for keys in (1, 2):
        contrast = identity(build(num_hidden=0, weight=1.0, temperature=1.0, memory={}))
        contrast.memory.filled[0] = keys
        contrast.memory.keys[:keys] = torch.eye(WIDTH)[0]
        losses.append(loss_of(contrast, four_pixels()).item())
    # Class 0: softplus(log 2 - 1) for each positive. Class 1 meets one negative more.
    own, more = math.log1p(2 / math.e), [math.log1p((2 + n) / math.e) for n in (1, 2)]
    assert losses == pytest.approx([(own + more[0]) / 2, (own + more[1]) / 2])


def test_predictions_are_those_at_the_size_of_the_map() -> None:
    contrast = build(sampler=HardAnchorSampler(K, hard_share=1.0, max_per_group=4))
    features, labels, _ = random_batch(num_images=1)
    for size in (3, 6, 12, 48):
        scores = torch.zeros(1, K, size, size)
        scores[:, 0] = 1
        scores[:, 1, :, : size // 3] = 2
        output = run(contrast, (features, torch.zeros_like(labels), scores))
        assert output.statistics["contrast/res2/hard_share"] == 1
        assert output.statistics["contrast/res2/anchors"] == 4


# ---- the memory in a step


def test_bank_labels_are_resized_to_the_map() -> None:
    """And not to a stride that another network has."""
    features, labels, scores = random_batch()
    colours = torch.eye(CHANNELS["res2"])[downsample_labels(labels, (12, 12)).clamp(max=4)]
    contrast = identity(build(num_hidden=0, memory={}))
    run(contrast, ({"res2": colours.movedim(3, 1)}, labels, scores))
    keys = contrast.memory.contrast_set()
    assert set(keys.labels.tolist()) == {-1, 0, 1, 2, 3}
    for label in range(K):
        own = keys.embeddings[keys.labels == label]
        torch.testing.assert_close(own, torch.eye(WIDTH)[label].expand_as(own))


def test_the_bank_is_read_before_it_is_filled() -> None:
    batch = random_batch()
    torch.manual_seed(0)
    contrast = build(memory={})
    torch.manual_seed(0)
    without = build()
    first, second = run(contrast, batch), run(contrast, batch)
    assert first.losses == run(without, batch).losses != second.losses
    fills = [output.statistics["contrast/bank_fill"] for output in (first, second)]
    assert fills[0] == 0 < fills[1]


def test_what_is_not_filled_weighs_nothing() -> None:
    """Neither zeros nor noise stands in for keys that are yet to come."""
    contrast = build(memory={"regions_per_class": 20})
    noisy = copy.deepcopy(contrast)
    noisy.memory.keys.copy_(normalize(torch.randn_like(noisy.memory.keys), dim=1))
    for seed in range(3):
        batch = random_batch()
        assert loss_of(contrast, batch, seed) == loss_of(noisy, batch, seed)


def test_only_correct_pixels_are_admitted() -> None:
    features, labels, _ = random_batch()
    small = downsample_labels(labels, (12, 12))
    truth = torch.nn.functional.one_hot(small.clamp(max=K - 1), K).movedim(3, 1).float()
    one_wrong = truth.clone()
    image, row, column = (small == 1).nonzero()[0].tolist()
    one_wrong[image, :, row, column] = torch.tensor([1.0, 0, 0, 0])
    every = {"pixels_per_class": 400, "pixels_per_image": 144}

    def stored(scores: Tensor, **options) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        contrast = build(memory={**every, **options}, num_hidden=0)
        generator = torch.Generator().manual_seed(1)
        contrast(features, labels, scores, generator=generator)
        sizes = [3 * K, 400 * K]
        keys = contrast.memory.keys.split(sizes)
        return [*keys, contrast.memory.filled], [generator.get_state(), contrast.memory.pointers]

    plain, plain_state = stored(truth)
    # All right: as without, to the last bit and random number.
    same, state = stored(truth, admission="correct")
    assert all(map(torch.equal, same + state, plain + plain_state))
    # All wrong: nothing.
    (regions, pixels, filled), state = stored(-truth, admission="correct")
    assert not regions.any() and not pixels.any() and not filled.any()
    # One wrong: that pixel is missing, and in the mean of its region.
    (regions, pixels, filled), state = stored(one_wrong, admission="correct")
    assert (plain[2] - filled).tolist() == [0] * K + [0, 1, 0, 0]
    torch.manual_seed(0)
    rows = normalize(build(memory=every, num_hidden=0).projector(features)["res2"], dim=1)
    wrong = rows[image, :, row, column].detach()
    assert (plain[1] - wrong).norm(dim=1).min() < 1e-6 < (pixels - wrong).norm(dim=1).min()
    of_region = rows[image][:, small[image] == 1].detach()
    mean = normalize(of_region.sum(dim=1) - wrong, dim=0)
    assert (regions - mean).norm(dim=1).min() < 1e-6 < (plain[0] - mean).norm(dim=1).min()


def test_an_ignored_crop_and_one_class_meet_a_full_bank() -> None:
    contrast = build(memory={})
    for _ in range(3):
        run(contrast, random_batch())
    features, labels, scores = random_batch()
    assert loss_of(contrast, (features, torch.full_like(labels, 255), scores)) == 0
    # One class alone has the bank's other classes as negatives.
    assert loss_of(contrast, (features, torch.full_like(labels, 2), scores)) > 0


def test_keys_carry_no_gradient() -> None:
    contrast = build(memory={})
    for _ in range(3):  # each backward runs after the next step would have changed the bank
        loss = loss_of(contrast, random_batch())
        assert not contrast.memory.keys.requires_grad
        contrast.memory.keys.zero_()
        assert all(g.any() for g in torch.autograd.grad(loss, list(contrast.parameters())))


def test_memory_goes_with_an_auxiliary_loss() -> None:
    features, labels, scores = random_batch()
    contrast, seg_loss = build(memory={}), SegLoss(CrossEntropyLoss(), aux_weight=0.4)
    auxiliary = torch.randn_like(scores).requires_grad_()
    losses = seg_loss(SegOutput(scores.requires_grad_(), auxiliary, {}), labels)
    losses.update(contrast(features, labels, scores).losses)
    assert sorted(losses) == ["loss_aux", "loss_contrast_res2", "loss_sem_seg"]
    sum(losses.values()).backward()
    assert auxiliary.grad.any() and contrast.memory.fill_fraction() > 0


# ---- several processes


def train_on_rank(steps: int) -> dict:
    """A few steps of each rank's own batches under DistributedDataParallel."""
    torch.manual_seed(0)
    contrast = build(memory={}, warmup_iters=1, num_hidden=0)
    model = DistributedDataParallel(contrast, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        torch.manual_seed(10 * step + dist.get_rank())
        features, labels, scores = random_batch(num_images=1 + dist.get_rank())
        if step == 2 and dist.get_rank() == 0:
            labels[:] = 255  # this rank has no anchors, and all its parameters take part
        optimizer.zero_grad()
        loss = sum(model(features, labels, scores).losses.values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "state": contrast.state_dict()}


def test_two_processes_train_with_one_bank() -> None:
    first, second = run_processes(train_on_rank, 2, 4)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    # Three images a step, of which the first had all classes: no ring of regions is short of one.
    assert (first["state"]["memory.filled"][:3] == 3).all()
    assert first["losses"][0] == second["losses"][0] == first["losses"][2] == 0
    assert first["losses"][3] > 0 and second["losses"][3] > 0
    assert first["losses"][3] != second["losses"][3]


# ---- errors


def test_wrong_arguments_are_named() -> None:
    projector = MultiScaleProjector(CHANNELS, WIDTH)
    sampled = MultiScaleProjector(CHANNELS, WIDTH, projection="sampled")
    negatives = BoundaryNegatives(K)
    cases = {
        "weight=-0.1": {"weight": -0.1},
        "weight=nan": {"weight": math.nan},
        "temperature=0.0": {"temperature": 0.0},
        "num_classes=7.*4": {"memory": MemoryBank(7, WIDTH, **BANK)},
        "embed_dim=9.*6": {"memory": MemoryBank(K, 9, **BANK)},
        "pairs and negatives": {"pairs": SemiHardPairs(), "negatives": negatives},
        "'res4'.*'res": {"feature": "res4"},
        "projection='sampled'": {"projector": sampled, "memory": MemoryBank(K, WIDTH, **BANK)},
    }
    for message, options in cases.items():
        defaults = {"projector": projector, "sampler": HardAnchorSampler(K), "feature": "res2"}
        with pytest.raises(ValueError, match=message):
            PixelContrast(**{**defaults, **options})
