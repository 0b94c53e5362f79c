"""Pixel contrast as a whole. Shape letters: B images, A anchors, K classes, D width."""

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
    BoundaryNegatives,
    HardAnchorSampler,
    MemoryBank,
    MultiScaleProjector,
    PixelContrast,
    SemiHardPairs,
    downsample_labels,
    gather_embeddings,
    predicted_labels,
)
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.structures import SegOutput

from ..helpers import HostWaits, run_processes
from . import references
from .test_info_nce import with_gradients
from .test_pairs import EVERY

NUM_CLASSES = 4
CHANNELS = {"res2": 5, "res3": 6}
WIDTH = 6


def build(*, memory: dict | MemoryBank | None = None, **arguments) -> PixelContrast:
    """Pixel contrast of few anchors; `memory` are arguments of a bank."""
    head = {name: arguments.pop(name) for name in ("num_hidden", "norm") if name in arguments}
    projector = MultiScaleProjector(CHANNELS, WIDTH, **{"num_hidden": 1, **head})
    sampler = arguments.pop("sampler", HardAnchorSampler(NUM_CLASSES, max_per_group=8))
    if isinstance(memory, dict):
        memory = MemoryBank(NUM_CLASSES, WIDTH, **memory)
    return PixelContrast(projector, sampler, feature="res2", memory=memory, **arguments)


BANK = {"regions_per_class": 3, "pixels_per_class": 8, "pixels_per_image": 3}


def random_batch(num_images: int = 2, size: int = 48) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features at stride 4, class scores at stride 8 and labels; class 3 is in one image alone."""
    features = {"res2": torch.randn(num_images, CHANNELS["res2"], size // 4, size // 4)}
    patches = torch.tensor([0, 1, 2, 255])[torch.randint(4, (num_images, size // 8, size // 8))]
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, 16:24, :16] = 3
    scores = torch.randn(num_images, NUM_CLASSES, size // 8, size // 8)
    return features, scores, labels


def run(contrast: PixelContrast, batch: tuple, seed: int = 1):
    return contrast(*batch, torch.Generator().manual_seed(seed))


def double(batch: tuple) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    features, scores, labels = batch
    return {n: f.double().requires_grad_() for n, f in features.items()}, scores.double(), labels


def gradients(loss: Tensor, module: torch.nn.Module) -> dict[str, Tensor | None]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters()}


def draw(contrast: PixelContrast, batch: tuple, seed: int = 1) -> tuple[Tensor, list[int], Tensor]:
    """Embeddings and labels of the anchors that a call with this seed contrasts, and which of them
    are wrongly predicted."""
    features, scores, labels = batch
    embeddings = contrast.projector(features)["res2"]
    label_map = downsample_labels(labels, embeddings.shape[-2:])
    predictions = predicted_labels(scores, embeddings.shape[-2:])
    (found,) = contrast.sampler([label_map], [predictions], torch.Generator().manual_seed(seed))
    wrong = (predictions != label_map).flatten(1)[found.image, found.pixel]
    return gather_embeddings(embeddings, found.image, found.pixel), found.labels.tolist(), wrong


# ---- the equations


def expected_loss(contrast: PixelContrast, batch: tuple, bank: tuple | None) -> Tensor:
    anchors, labels, _ = draw(contrast, batch)
    if bank is None:
        return references.within_loss(anchors, labels, contrast.temperature)
    keys, key_labels = bank
    lead = contrast.contrast_batch
    return references.cross_loss(
        anchors,
        labels,
        torch.cat([anchors, keys]) if lead else keys,
        (labels if lead else []) + key_labels.tolist(),
        contrast.temperature,
        lead=lead,
    )


@pytest.mark.parametrize("contrast_batch", [True, False, None])
def test_total_equals_the_equations(contrast_batch: bool | None) -> None:
    memory = {} if contrast_batch is None else {"memory": BANK, "contrast_batch": contrast_batch}
    contrast = build(weight=0.3, temperature=0.2, **memory).double()
    first, second = double(random_batch()), double(random_batch())
    run(contrast, first)
    bank = None
    if contrast.memory is not None:
        bank = tuple(copy.deepcopy(contrast.memory).contrast_set())
        assert (bank[1] < 0).any() and (bank[1] >= 0).any()  # partly filled
    loss = run(contrast, second).losses["loss_contrast_res2"]
    expected = 0.3 * expected_loss(contrast, second, bank)
    inputs = [*second[0].values(), *contrast.parameters()]
    torch.testing.assert_close(
        with_gradients(loss, *inputs), with_gradients(expected, *inputs), rtol=1e-7, atol=1e-12
    )


def test_fp32_takes_the_same_anchors_and_keys() -> None:
    """By the kernel for which anchors come in the order of their classes, and keys do not."""
    contrast = build(memory=BANK)
    twin = copy.deepcopy(contrast).double()
    for seed in range(3):
        batch = random_batch()
        loss = run(contrast, batch, seed).losses["loss_contrast_res2"]
        exact = run(twin, double(batch), seed).losses["loss_contrast_res2"]
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_semi_hard_loss_equals_the_equations() -> None:
    contrast = build(memory=BANK, pairs=SemiHardPairs(0.3, **EVERY), temperature=0.2).double()
    run(contrast, double(random_batch()))
    batch = double(random_batch())
    anchors, labels, _ = draw(contrast, batch)
    keys, key_labels = copy.deepcopy(contrast.memory).contrast_set()
    everything, classes = torch.cat([anchors, keys]), labels + key_labels.tolist()
    similarities = anchors @ everything.T
    means = []
    for i, label in enumerate(labels):
        columns = sorted(range(len(classes)), key=lambda j, i=i: similarities[i, j].item())
        positives = [j for j in columns if classes[j] == label and j != i]
        negatives = [j for j in columns if 0 <= classes[j] != label][::-1]
        positives = positives[: max(1, math.floor(0.3 * len(positives) + 0.5))]
        negatives = negatives[: max(1, math.floor(0.3 * len(negatives) + 0.5))]
        rows = [everything[n] for n in negatives]
        pairs = [references.pair_loss(anchors[i], everything[j], rows, 0.2) for j in positives]
        means.append(sum(pairs) / len(pairs))
    loss = run(contrast, batch).losses["loss_contrast_res2"]
    torch.testing.assert_close(loss, 0.1 * sum(means) / len(means))


def four_pixels() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Two pixels each of two classes; all predicted as class 0."""
    labels = torch.tensor([[[0, 0], [1, 1]]])
    features = torch.zeros(1, CHANNELS["res2"], 2, 2)
    features[0, 0, 0] = 2.0
    features[0, 1, 1] = 3.0
    scores = torch.zeros(1, NUM_CLASSES, 2, 2)
    scores[:, 0] = 1
    return {"res2": features}, scores, labels


def identity(contrast: PixelContrast) -> PixelContrast:
    """The first channels are the embedding."""
    (conv,) = contrast.projector.heads["res2"]
    with torch.no_grad():
        conv.weight.copy_(torch.eye(WIDTH)[:, : CHANNELS["res2"], None, None])
        conv.bias.zero_()
    return contrast


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_orthogonal_classes_in_closed_form(temperature: float) -> None:
    # One positive at similarity 1, two negatives at 0: softplus(log 2 - 1 / t).
    contrast = identity(build(num_hidden=0, weight=1.0, temperature=temperature))
    output = run(contrast, four_pixels())
    expected = math.log1p(2 * math.exp(-1 / temperature))
    assert output.losses["loss_contrast_res2"].item() == pytest.approx(expected, rel=1e-5)
    if temperature == 1:
        assert expected == pytest.approx(math.log(1 + 2 / math.e))
    statistics = {name.split("/")[-1]: value.item() for name, value in output.statistics.items()}
    assert statistics == {
        "hard_share": 0.5,
        "anchors": 4,
        "classes": 2,
        "positive_similarity": pytest.approx(1),
        "negative_similarity": pytest.approx(0),
    }


def test_base_temperature_scales_the_loss() -> None:
    batch = random_batch()
    losses = {}
    for base in (None, 0.1, 0.07):
        torch.manual_seed(0)
        losses[base] = run(build(temperature=0.1, base_temperature=base), batch).losses
    assert losses[None] == losses[0.1]
    ratio = losses[0.07]["loss_contrast_res2"] / losses[0.1]["loss_contrast_res2"]
    assert ratio.item() == pytest.approx(1.4286, rel=1e-4)


def test_a_further_positive_changes_no_pair() -> None:
    # Other positives are in no denominator: a bank with one more key at the anchors' own place
    # leaves the pairs of the others alone, and its own pair is that of the first.
    losses = []
    for keys in (1, 2):
        contrast = identity(build(num_hidden=0, weight=1.0, temperature=1.0, memory=BANK))
        contrast.memory.filled[0, 0] = keys
        contrast.memory.regions[0, :keys] = torch.eye(WIDTH)[0]
        losses.append(run(contrast, four_pixels()).losses["loss_contrast_res2"].item())
    # Class 0: softplus(log 2 - 1) for each positive. Class 1 meets one negative more.
    own, more = math.log1p(2 / math.e), [math.log1p((2 + n) / math.e) for n in (1, 2)]
    assert losses == pytest.approx([(own + more[0]) / 2, (own + more[1]) / 2])


def test_anchors_are_those_of_the_predictions_at_the_size_of_the_map() -> None:
    """Class scores of any resolution, of which the wrongly predicted pixels are found."""
    contrast = build(sampler=HardAnchorSampler(NUM_CLASSES, hard_share=1.0, max_per_group=4))
    features, _, labels = random_batch(num_images=1)
    labels = torch.zeros_like(labels)
    for size in (3, 6, 12, 48):
        scores = torch.zeros(1, NUM_CLASSES, size, size)
        scores[:, 0] = 1
        scores[:, 1, :, : size // 3] = 2
        wrong = draw(contrast, (features, scores, labels))[2]
        assert wrong.all() and len(wrong) == 4
        statistics = run(contrast, (features, scores, labels)).statistics
        assert statistics["contrast/res2/hard_share"] == 1


def test_statistics_are_those_of_the_anchors() -> None:
    contrast = build(memory=BANK).double()
    run(contrast, double(random_batch()))
    batch = double(random_batch())
    anchors, labels, wrong = draw(contrast, batch)
    keys, key_labels = copy.deepcopy(contrast.memory).contrast_set()
    fill = contrast.memory.fill_fraction()
    statistics = run(contrast, batch).statistics
    same, different = [], []
    everything = torch.cat([anchors, keys])
    for i, label in enumerate(labels):
        for j, other in enumerate(labels + key_labels.tolist()):
            if other >= 0 and i != j:
                (same if label == other else different).append(
                    torch.dot(anchors[i], everything[j]).item()
                )
    expected = {
        "bank_fill": fill.item(),
        "hard_share": wrong.float().mean().item(),
        "anchors": len(labels),
        "classes": len(set(labels)),
        "positive_similarity": sum(same) / len(same),
        "negative_similarity": sum(different) / len(different),
    }
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(
        {f"contrast/res2/{name}": value for name, value in expected.items()}
    )
    assert not any(value.requires_grad or value.dim() for value in statistics.values())


# ---- the memory in a step


def test_bank_labels_are_resized_to_the_map() -> None:
    """And not to a stride that another network has."""
    features, scores, labels = random_batch()
    label_map = downsample_labels(labels, (12, 12))
    colours = torch.eye(CHANNELS["res2"])[label_map.clamp(max=4)].movedim(3, 1)
    contrast = identity(build(num_hidden=0, memory=BANK))
    run(contrast, ({"res2": colours}, scores, labels))
    keys, key_labels = contrast.memory.contrast_set()
    assert set(key_labels.tolist()) == {-1, 0, 1, 2, 3}
    for label in range(NUM_CLASSES):
        own = keys[key_labels == label]
        torch.testing.assert_close(own, torch.eye(WIDTH)[label].expand_as(own))


def test_the_bank_is_read_before_it_is_filled() -> None:
    batch = random_batch()
    torch.manual_seed(0)
    contrast = build(memory=BANK)
    torch.manual_seed(0)
    without = build()
    first = run(contrast, batch)
    assert first.losses == run(without, batch).losses
    assert first.statistics["contrast/res2/bank_fill"] == 0
    second = run(contrast, batch)
    assert second.losses != first.losses
    assert second.statistics["contrast/res2/bank_fill"] > 0


def test_an_empty_bank_alone_gives_zero() -> None:
    contrast = build(memory=BANK, contrast_batch=False)
    batch = random_batch()
    output = run(contrast, batch)
    found = gradients(output.losses["loss_contrast_res2"], contrast)
    assert output.losses["loss_contrast_res2"] == 0
    assert all(g is not None and not g.any() for g in found.values())
    assert run(contrast, batch).losses["loss_contrast_res2"] > 0


@pytest.mark.parametrize("contrast_batch", [True, False])
def test_only_the_batch_has_a_self(contrast_batch: bool) -> None:
    """A key of the bank is a positive of the anchor at the same place in the order, and the bank
    may hold fewer keys than there are anchors."""
    contrast = identity(
        build(
            num_hidden=0,
            weight=1.0,
            temperature=1.0,
            memory={"regions_per_class": 1, "pixels_per_class": 0},
            contrast_batch=contrast_batch,
        )
    )
    contrast.memory.regions[:2, 0] = torch.eye(WIDTH)[:2]
    contrast.memory.filled[0, :2] = 1
    loss = run(contrast, four_pixels()).losses["loss_contrast_res2"].item()
    # Each anchor has its class's key as positive, and the other's as negative.
    negatives = 3 if contrast_batch else 1
    assert loss == pytest.approx(math.log1p(negatives / math.e))


def test_what_is_not_filled_weighs_nothing() -> None:
    """Neither zeros nor noise stands in for keys that are yet to come."""
    contrast = build(memory={**BANK, "regions_per_class": 20})
    noisy = copy.deepcopy(contrast)
    noisy.memory.keys.copy_(normalize(torch.randn_like(noisy.memory.keys), dim=1))
    for seed in range(3):
        batch = random_batch()
        assert run(contrast, batch, seed).losses == run(noisy, batch, seed).losses


def test_a_method_without_memory_has_none() -> None:
    """A bank is there if it is given, not if the word is."""
    contrast = build(memory=None)
    output = run(contrast, random_batch())
    assert contrast.memory is None and "contrast/res2/bank_fill" not in output.statistics
    assert [name for name in contrast.state_dict() if "projector" not in name] == ["warmup.passes"]


def test_memory_goes_with_an_auxiliary_loss() -> None:
    features, scores, labels = random_batch()
    contrast, seg_loss = build(memory=BANK), SegLoss(CrossEntropyLoss(), aux_weight=0.4)
    auxiliary = torch.randn_like(scores).requires_grad_()
    for _ in range(2):
        losses = seg_loss(SegOutput(scores.requires_grad_(), auxiliary, {}), labels)
        losses.update(contrast(features, scores.detach(), labels).losses)
        assert sorted(losses) == ["loss_aux", "loss_contrast_res2", "loss_sem_seg"]
        sum(losses.values()).backward()
    assert auxiliary.grad.any() and contrast.memory.fill_fraction() > 0


def test_single_anchors_are_hard_ones() -> None:
    """Half of one anchor, rounded down, would leave the easy ones alone: with a memory, one anchor
    per class and image is enough."""
    sampler = HardAnchorSampler(
        NUM_CLASSES, balance="image_class", max_per_group=1, rest="easy", min_pixels=1
    )
    contrast = build(sampler=sampler, memory=BANK, contrast_batch=False)
    features, scores, labels = random_batch()
    labels[labels == 255] = 1
    run(contrast, (features, scores, labels))
    output = run(contrast, (features, scores, labels))
    assert output.losses["loss_contrast_res2"] > 0
    assert output.statistics["contrast/res2/hard_share"] == 1


def test_a_part_of_the_bank() -> None:
    contrast = build(memory=BANK, memory_per_class=2).double()
    for _ in range(3):
        run(contrast, double(random_batch()))
    batch = double(random_batch())
    anchors, labels, _ = draw(contrast, batch)
    # The step's second use of the generator.
    generator = torch.Generator().manual_seed(1)
    features, scores, full = batch
    size = features["res2"].shape[-2:]
    contrast.sampler([downsample_labels(full, size)], [predicted_labels(scores, size)], generator)
    keys, key_labels = contrast.memory.contrast_set(2, generator)
    assert len(keys) == 8
    expected = references.cross_loss(
        anchors, labels, torch.cat([anchors, keys]), labels + key_labels.tolist(), 0.1, lead=True
    )
    loss = run(contrast, batch).losses["loss_contrast_res2"]
    torch.testing.assert_close(loss, 0.1 * expected)


def test_keys_carry_no_gradient() -> None:
    contrast = build(memory=BANK)
    for _ in range(3):  # each backward runs after the next step would have changed the bank
        output = run(contrast, random_batch())
        assert not contrast.memory.keys.requires_grad
        contrast.memory.keys.zero_()
        assert all(g.any() for g in gradients(sum(output.losses.values()), contrast).values())


# ---- warm-up


def test_warm_up_fills_the_bank_without_contrast() -> None:
    contrast = build(memory=BANK, warmup_iters=2, ramp_iters=1, weight=0.4)
    twin = build(memory=BANK, weight=0.4)
    twin.projector.load_state_dict(contrast.projector.state_dict())
    for step, factor in enumerate([0, 0, 0.5, 1]):
        batch = random_batch()
        output = run(contrast, batch, step)
        loss = output.losses["loss_contrast_res2"]
        found = gradients(loss, contrast)
        assert all(g is not None and g.isfinite().all() for g in found.values())
        if factor == 0:
            assert loss == 0 and not any(g.any() for g in found.values())
            assert list(output.statistics) == ["contrast/res2/bank_fill"]
            assert contrast.memory.filled.sum() > 0
            twin.memory.load_state_dict(contrast.memory.state_dict())
        else:
            expected = run(twin, batch, step).losses["loss_contrast_res2"]
            torch.testing.assert_close(loss, factor * expected)


def test_a_resumed_run_continues_bit_for_bit() -> None:
    batches = [random_batch() for _ in range(5)]
    contrast = build(memory=BANK, warmup_iters=1, ramp_iters=2)
    for seed, batch in enumerate(batches[:2]):
        run(contrast, batch, seed)
    resumed = build(memory=BANK, warmup_iters=1, ramp_iters=2)
    resumed.load_state_dict(copy.deepcopy(contrast.state_dict()), strict=True)
    for seed, batch in enumerate(batches[2:]):
        expected, found = run(contrast, batch, seed), run(resumed, batch, seed)
        assert found.losses == expected.losses and found.losses["loss_contrast_res2"] > 0
    for name, value in contrast.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# ---- degenerate crops


@pytest.mark.parametrize("fill", [255, 2])
@pytest.mark.parametrize("options", [{}, {"memory": BANK}, {"pairs": SemiHardPairs()}])
def test_nothing_to_contrast_gives_zero(options: dict, fill: int) -> None:
    features, scores, labels = random_batch()
    features["res2"].requires_grad_()
    contrast = build(**options)
    for _ in range(2):
        output = run(contrast, (features, scores, torch.full_like(labels, fill)))
        assert output.losses["loss_contrast_res2"] == 0
        assert output.statistics["contrast/res2/anchors"] == (0 if fill == 255 else 8)
        found = gradients(sum(output.losses.values()), contrast)
        found["features"] = features["res2"].grad
        assert all(g is not None and not g.any() for g in found.values())


def test_an_ignored_crop_meets_a_full_bank() -> None:
    contrast = build(memory=BANK)
    for _ in range(3):
        run(contrast, random_batch())
    features, scores, labels = random_batch()
    output = run(contrast, (features, scores, torch.full_like(labels, 255)))
    found = gradients(sum(output.losses.values()), contrast)
    assert output.losses["loss_contrast_res2"] == 0
    assert all(g is not None and not g.any() for g in found.values())
    # And one class alone has the bank's other classes as negatives.
    output = run(contrast, (features, scores, torch.full_like(labels, 2)))
    assert output.losses["loss_contrast_res2"] > 0


def test_perfect_predictions() -> None:
    features, _, labels = random_batch()
    label_map = downsample_labels(labels, (12, 12)).clamp(max=3)
    scores = torch.nn.functional.one_hot(label_map, NUM_CLASSES).movedim(3, 1).float()
    output = run(build(), (features, scores, labels))
    assert output.statistics["contrast/res2/hard_share"] == 0
    assert output.losses["loss_contrast_res2"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_autocast(dtype: torch.dtype, temperature: float) -> None:
    contrast = build(memory=BANK, temperature=temperature, norm=None)
    plain = copy.deepcopy(contrast)
    for seed in range(2):
        batch = random_batch()
        expected = run(plain, batch, seed).losses["loss_contrast_res2"]
        reference = gradients(expected, plain)
        with torch.autocast("cpu", dtype=dtype):
            loss = run(contrast, batch, seed).losses["loss_contrast_res2"]
        found = gradients(loss, contrast)
        assert loss.dtype == torch.float32 and contrast.memory.keys.isfinite().all()
        torch.testing.assert_close(loss, expected, rtol=0.01 / temperature, atol=0.01)
        for name, gradient in found.items():
            assert gradient.isfinite().all() and gradient.dtype == torch.float32
            cosine = torch.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0)
            assert cosine > 0.9, name


# ---- as a module


def test_other_maps_have_no_projector() -> None:
    contrast = build()
    assert set(contrast.projector.heads) == {"res2"}
    found = gradients(sum(run(contrast, random_batch()).losses.values()), contrast)
    assert all(g.any() for g in found.values())


def test_a_step_waits_once_for_the_device() -> None:
    contrast, batch = build(memory=BANK, memory_per_class=2, pairs=SemiHardPairs()), random_batch()
    for _ in range(2):
        with HostWaits() as waits:
            sum(contrast(*batch).losses.values()).backward()
        assert waits.calls == ["cpu"]  # how many anchors there are


def test_the_generator_fixes_the_step() -> None:
    batches = [random_batch() for _ in range(3)]
    contrast = build(memory=BANK, memory_per_class=4, pairs=SemiHardPairs(1.0, 2, 2))
    found = []
    for seed in (1, 1, 2):
        one = copy.deepcopy(contrast)
        found.append([run(one, batch, seed).losses["loss_contrast_res2"] for batch in batches])
    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[0], found[2], strict=True))


def test_a_compiled_step_breaks_its_graph_once() -> None:
    batch, contrast = random_batch(), build(memory=BANK)
    twin = copy.deepcopy(contrast)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(contrast, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(run(compiled, batch).losses, run(twin, batch).losses)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1


# ---- several processes


def train_on_rank(steps: int) -> dict:
    """A few steps of each rank's own batches under DistributedDataParallel."""
    torch.manual_seed(0)
    contrast = build(memory=BANK, warmup_iters=1, num_hidden=0)
    model = DistributedDataParallel(contrast, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        torch.manual_seed(10 * step + dist.get_rank())
        features, scores, labels = random_batch(num_images=1 + dist.get_rank())
        if step == 2 and dist.get_rank() == 0:
            labels[:] = 255  # this rank has no anchors, and all its parameters take part
        optimizer.zero_grad()
        loss = sum(model(features, scores, labels).losses.values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "state": contrast.state_dict()}


def test_two_processes_train_with_one_bank() -> None:
    first, second = run_processes(train_on_rank, 2, 4)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    # Three images a step, of which the first had all classes: no ring of regions is short of one.
    assert (first["state"]["memory.filled"][0, :3] == 3).all()
    assert first["losses"][0] == second["losses"][0] == first["losses"][2] == 0
    assert first["losses"][3] > 0 and second["losses"][3] > 0
    assert first["losses"][3] != second["losses"][3]


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.1}, "weight=-0.1: must be 0 or more"),
        ({"weight": math.nan}, "weight=nan"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"base_temperature": -0.07}, "base_temperature=-0.07: must be above 0"),
        ({"products": "fp16"}, "products='fp16': choose one of"),
        ({"warmup_iters": -1}, r"Warmup\(start=-1\)"),
        ({"memory_per_class": 5}, "memory_per_class=5 goes with a memory"),
        ({"memory": BANK, "memory_per_class": 0}, "memory_per_class=0: set it to 1 or more"),
        ({"contrast_batch": False}, "contrast_batch=False without a memory"),
        (
            {"memory": MemoryBank(7, WIDTH, **BANK)},
            "num_classes=7, but the sampler has 4: set both alike",
        ),
        (
            {"memory": MemoryBank(NUM_CLASSES, 9, **BANK)},
            "embed_dim=9, but the projector has 6: set both alike",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_an_unknown_map_is_named() -> None:
    with pytest.raises(ValueError, match="'res4'.*Did you mean 'res"):
        PixelContrast(MultiScaleProjector(CHANNELS, WIDTH), HardAnchorSampler(4), feature="res4")


def test_missing_class_scores_are_named() -> None:
    features, _, labels = random_batch()
    with pytest.raises(ValueError, match="needs the class scores"):
        build()(features, None, labels)


# ---- drawn negatives


@pytest.mark.parametrize("contrast_batch", [True, False, None])
def test_drawn_negatives_take_the_place_of_other_classes(contrast_batch: bool | None) -> None:
    memory = {} if contrast_batch is None else {"memory": BANK, "contrast_batch": contrast_batch}
    negatives = BoundaryNegatives(NUM_CLASSES, max_negatives=30)
    contrast = build(negatives=negatives, weight=0.3, temperature=0.2, **memory).double()
    first, second = double(random_batch()), double(random_batch())
    run(contrast, first)
    keys, key_labels = torch.zeros(0, WIDTH, dtype=torch.float64), []
    if contrast.memory is not None:
        keys, key_labels = copy.deepcopy(contrast.memory).contrast_set()
        key_labels = key_labels.tolist()
    output = run(contrast, second)

    features, scores, labels = second
    generator = torch.Generator().manual_seed(1)
    maps = contrast.projector(features)["res2"]
    label_map = downsample_labels(labels, maps.shape[-2:])
    predictions = predicted_labels(scores, maps.shape[-2:])
    (drawn,) = contrast.sampler([label_map], [predictions], generator)
    (drawn_negatives,) = negatives([label_map], [predictions], generator)
    assert len(drawn_negatives.labels) == 30
    anchors = gather_embeddings(maps, drawn.image, drawn.pixel)
    units = gather_embeddings(maps, drawn_negatives.image, drawn_negatives.pixel)
    in_batch = contrast_batch is not False
    expected = 0.3 * references.two_role_loss(
        anchors,
        drawn.labels.tolist(),
        torch.cat([anchors, keys]) if in_batch else keys,
        units,
        (drawn.labels.tolist() if in_batch else []) + key_labels,
        drawn_negatives.labels.tolist(),
        0.2,
        among_themselves=in_batch,
    )
    loss = output.losses["loss_contrast_res2"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    inputs = [*features.values(), *contrast.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs, retain_graph=True),
        torch.autograd.grad(expected, inputs),
        rtol=1e-7,
        atol=1e-12,
    )
    different = drawn.labels[:, None] != drawn_negatives.labels
    assert output.statistics["contrast/res2/negatives"] == 30
    torch.testing.assert_close(
        output.statistics["contrast/res2/negative_similarity"],
        (anchors @ units.T)[different].mean().detach(),
    )


def test_negatives_are_chosen_once() -> None:
    with pytest.raises(ValueError, match="pairs and negatives both choose"):
        build(pairs=SemiHardPairs(), negatives=BoundaryNegatives(NUM_CLASSES))
