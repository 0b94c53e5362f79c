"""What every contrast method has to do. A new method is one more row of METHODS."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from contrast_d2.contrast import (
    BoundaryNegatives,
    ContextrastPlus,
    ContrastSum,
    Inspection,
    MemoryBank,
    MultiScaleContrast,
    MultiScaleProjector,
    SemiHardPairs,
    centre_regulariser,
    clustered_prototypes,
    contextrast,
    fixed_prototypes,
    ms_cs,
    ms_cs_paper,
    ms_cs_release,
    pixel_contrast,
    pixel_contrast_release,
    pne,
    pne_release,
    region_contrast,
    tree_triplets,
)
from contrast_d2.contrast.method import connected_zero

from ..helpers import gpu_waits

K, WIDTH = 4, 6
CHANNELS = {"res2": 5, "res3": 6, "res4": 7, "res5": 8}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
SMALL = {"embed_dim": WIDTH}
FEW = {**SMALL, "max_anchors": 60}


def multi_scale(**options) -> MultiScaleContrast:
    return ms_cs(CHANNELS, K, min_per_class=8, **FEW, **options)


def bank(**options) -> MemoryBank:
    sizes = {"regions_per_class": 3, "pixels_per_class": 8, "pixels_per_image": 3}
    return MemoryBank(K, WIDTH, **sizes, **options)


def regions() -> MemoryBank:
    return MemoryBank(K, WIDTH, regions_per_class=5, pixels_per_class=0)


def pixel(**options) -> nn.Module:
    return pixel_contrast(CHANNELS, K, feature="res2", warmup_iters=0, **FEW, **options)


def plus() -> ContextrastPlus:
    layers = {"res2": 0.1, "res3": 0.3, "res5": 1.0}
    projector = MultiScaleProjector(CHANNELS, WIDTH, num_hidden=1)
    return ContextrastPlus(projector, K, layers=layers, anchor_memory=3)


# Contrast with the keys of earlier batches alone, which the first step does not have.
OF_THE_PAST = ("region", "region labels")
# Have negatives even where the batch has one class.
WITH_PROTOTYPES = ("clustered prototypes", "centres")
# Draw no pixels.
OF_ALL_PIXELS = (*OF_THE_PAST, "centres")

METHODS: Mapping[str, Callable[[], nn.Module]] = {
    "ms_cs": multi_scale,
    "ms_cs sampled": lambda: multi_scale(projection="sampled"),
    "ms_cs sampled, layer norm": lambda: multi_scale(projection="sampled", norm="layer"),
    "ms_cs boundary negatives": lambda: multi_scale(negatives=BoundaryNegatives(K)),
    "ms_cs_release": lambda: ms_cs_release(CHANNELS, K, **FEW),
    "ms_cs_release majority": lambda: ms_cs_release(CHANNELS, K, label_sampling="majority", **FEW),
    "pixel": pixel,
    "pixel memory": lambda: pixel(memory=bank()),
    "pixel memory, some keys": lambda: pixel(memory=bank(max_keys=4 * K)),
    "pixel semi-hard": lambda: pixel(memory=bank(), pairs=SemiHardPairs(0.5, 3, 9)),
    "pixel boundary negatives": lambda: pixel(negatives=BoundaryNegatives(K)),
    "pixel_release": lambda: pixel_contrast_release(
        CHANNELS, K, feature="res2", warmup_iters=0, **FEW
    ),
    "pixel_release, memory": lambda: pixel_contrast_release(
        CHANNELS,
        K,
        feature="res2",
        warmup_iters=0,
        max_per_group=1,
        memory=bank(max_keys=None),
        **FEW,
    ),
    "contextrast": lambda: contextrast(CHANNELS, K, **SMALL),
    "contextrast++": plus,
    "pne": lambda: pne(CHANNELS, K, feature="res2", max_hard=1.0, **SMALL),
    "pne_release": lambda: pne_release(CHANNELS, K, feature="res2", **SMALL),
    "region": lambda: region_contrast(CHANNELS, K, regions(), feature="res2", **SMALL),
    "region labels": lambda: region_contrast(
        CHANNELS, K, regions(), feature="res2", centres="labels", **SMALL
    ),
    "fixed prototypes": lambda: fixed_prototypes(CHANNELS, K, feature="res2", **FEW),
    "clustered prototypes": lambda: clustered_prototypes(
        CHANNELS, K, feature="res2", prototypes_per_class=3, **FEW
    ),
    "centres": lambda: centre_regulariser(CHANNELS, K, feature="res2", **SMALL),
    "pixel memory, correct": lambda: pixel(memory=bank(admission="correct")),
    "tree": lambda: tree_triplets(CHANNELS, K, {"a": [0, 2], "b": [1, 3]}, feature="res2", **FEW),
    "sum": lambda: ContrastSum({"ms": multi_scale(), "px": pixel_like_ms(memory=bank())}),
}


def pixel_like_ms(**options) -> nn.Module:
    """With heads like those of multi-scale contrast, which can be shared."""
    method = pixel(**options)
    method.projector = MultiScaleProjector({"res2": CHANNELS["res2"]}, WIDTH, num_hidden=2)
    return method


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return METHODS[name]()


def parts_of(method: nn.Module) -> list[nn.Module]:
    return list(method.methods.values()) if isinstance(method, ContrastSum) else [method]


def random_batch(seed: int = 0, size: int = 128) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features, labels in patches, and scores that are right for about half of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    features = {
        name: torch.randn(2, c, size // STRIDES[name], size // STRIDES[name], generator=generator)
        for name, c in CHANNELS.items()
    }
    patches = torch.randint(K + 1, (2, size // 8, size // 8), generator=generator)
    patches[patches == K] = 255
    labels = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    scores = torch.randn(2, K, size // 4, size // 4, generator=generator)
    truth = nn.functional.one_hot(labels[:, ::4, ::4].clamp(max=K - 1), K).movedim(3, 1)
    return features, labels, scores + truth


def run(method: nn.Module, batch: tuple, seed: int = 1):
    return method(*batch, generator=torch.Generator().manual_seed(seed))


def gradients(losses: Mapping[str, Tensor], method: nn.Module, *leaves: Tensor) -> list[Tensor]:
    """Of the parameters and the leaves; fails where one has none."""
    return list(torch.autograd.grad(sum(losses.values()), [*method.parameters(), *leaves]))


def test_a_step(name: str) -> None:
    method = build(name)
    for seed in range(3):  # memories fill
        features, labels, scores = random_batch(seed)
        features = {name: x.requires_grad_() for name, x in features.items()}
        output = run(method, (features, labels, scores.requires_grad_()), seed)
        tapped = {head for part in parts_of(method) for head in part.projector.heads}
        found = gradients(output.losses, method, *(features[name] for name in tapped))
        assert all(x.isfinite().all() for x in found)
        # Official code leaves out what has few pixels, which at coarse scales is all.
        reached = sum(bool(x.any()) for x in found[-len(tapped) :])
        if name in OF_THE_PAST and seed == 0:
            assert reached == 0
        else:
            assert reached == len(tapped) or ("release" in name and reached > 0)
        # Scores tell what is wrong; they are not trained by it.
        assert (
            torch.autograd.grad(sum(output.losses.values()) + 0 * scores.sum(), scores)[0].any()
            == 0
        )
    for key, loss in output.losses.items():
        assert key.startswith("loss_contrast_") and loss.dim() == 0
        assert loss.dtype == torch.float32 and 0 <= loss < 10
    for key, value in output.statistics.items():
        assert key.startswith("contrast/") and value.dim() == 0 and not value.requires_grad
    shares = {key: value.item() for key, value in output.statistics.items() if "similarity" in key}
    assert not any(abs(share) > 1 + 1e-5 for share in shares.values())  # nan without pairs
    ignored = ((labels == 255).float().mean()).item()
    assert output.statistics["contrast/ignored_share"].item() == pytest.approx(ignored)


def test_nothing_to_contrast_gives_a_zero_that_reaches_everything(name: str) -> None:
    for fill in (255, -1) if name in WITH_PROTOTYPES else (255, -1, 2):
        method = build(name)
        features, labels, scores = random_batch()
        labels = torch.full_like(labels, fill)
        output = run(method, (features, labels, scores))
        assert all(loss == 0 for loss in output.losses.values())
        assert all(not x.any() for x in gradients(output.losses, method))


def test_small_and_perfect_batches_are_finite(name: str) -> None:
    features, labels, _ = random_batch()
    perfect = 20.0 * nn.functional.one_hot(labels[:, ::4, ::4].clamp(max=K - 1), K).movedim(3, 1)
    one_pixel = torch.full_like(labels, 255)
    one_pixel[0, 0, 0] = 1
    small = {name: x[:1, :, :1, :1] for name, x in features.items()}
    cases = {
        "perfect": (features, labels, perfect),
        "all wrong": (features, labels, -perfect),
        "one labelled pixel": (features, one_pixel, perfect),
        "one image": ({n: x[:1] for n, x in features.items()}, labels[:1], perfect[:1]),
        "maps of one pixel": (small, labels[:1], perfect[:1]),
    }
    for case, batch in cases.items():
        method = build(name)
        if case == "maps of one pixel":
            method.eval()  # batch norms need more than one value
        output = run(method, batch)
        assert all(loss.isfinite() for loss in output.losses.values()), case
        assert all(x.isfinite().all() for x in gradients(output.losses, method)), case


def test_warm_up_survives_a_resume(name: str) -> None:
    method = build(name)
    for part in parts_of(method):
        part.warmup_iters = 2
    resumed = copy.deepcopy(method)
    for step, expected in enumerate((True, True, False)):
        output = run(method, random_batch(step))
        assert (sum(output.losses.values()) == 0) == expected
        assert len(gradients(output.losses, method)) == len(list(method.parameters()))
        if step == 0:
            resumed.load_state_dict(method.state_dict(), strict=True)
    for step, expected in ((1, True), (2, False)):
        output = run(resumed, random_batch(step))
        assert (sum(output.losses.values()) == 0) == expected
    for part in parts_of(method):
        if part.memory is not None:  # it is filled from the first step on
            assert part.memory.fill_fraction() > 0
    with pytest.raises(ValueError, match="warmup_iters=-1"):
        pixel_contrast({"res2": 5}, K, warmup_iters=-1)


def test_a_resumed_step_is_the_same(name: str) -> None:
    method, other = build(name), METHODS[name]()
    for seed in range(2):
        run(method, random_batch(seed))
    other.load_state_dict(copy.deepcopy(method.state_dict()), strict=True)
    assert run(other, random_batch(2)).losses == run(method, random_batch(2)).losses


def test_mixed_precision_rounds_the_projection_alone(name: str) -> None:
    method, batch = build(name), random_batch()
    run(method, random_batch(1))  # memories fill
    plain = run(copy.deepcopy(method), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(method, batch)
    for key, loss in output.losses.items():
        assert loss.dtype == torch.float32
        # The projector rounds by 2^-9, times 1 / temperature; pairs may be chosen otherwise.
        assert loss.item() == pytest.approx(plain.losses[key].item(), rel=0.2), key
    assert all(
        x.isfinite().all() and x.dtype == torch.float32 for x in gradients(output.losses, method)
    )


def test_an_inspection_changes_nothing(name: str) -> None:
    method = build(name)
    run(method, random_batch(1))
    watched, batch = copy.deepcopy(method), random_batch()
    watched.inspection = Inspection(K)
    states, losses = [], []
    for each in (method, watched):
        generator = torch.Generator().manual_seed(5)
        output = each(*batch, generator=generator)
        losses.append([*output.losses.values(), *gradients(output.losses, each)])
        states.append(generator.get_state())
    assert torch.equal(*states) and all(map(torch.equal, *losses))
    found = watched.inspection
    assert found.similarities and bool(found.draws) == (name not in OF_ALL_PIXELS)
    for draws in found.draws.values():
        for draw in draws.values():
            if "majority" in name:  # the pixel that is shown may be of another class
                continue
            assert torch.equal(batch[1][draw.image, draw.row, draw.column].long(), draw.labels)
    for similarities in found.similarities.values():
        for cosines in similarities[:2]:
            assert (cosines.abs() <= 1 + 1e-5).all()


def test_memory_format_and_label_type_do_not_matter(name: str) -> None:
    features, labels, scores = random_batch()
    expected = run(build(name), (features, labels, scores)).losses
    for form in (torch.channels_last, torch.contiguous_format):
        formed = {n: x.contiguous(memory_format=form) for n, x in features.items()}
        for dtype in (torch.uint8, torch.int32):
            losses = run(build(name), (formed, labels.to(dtype), scores)).losses
            torch.testing.assert_close(losses, expected)


def waits_of(name: str) -> int:
    """How often the host has to wait in a step: PNE's predictions say how many groups there are."""
    return int(name.startswith("pne"))


def test_a_step_needs_no_value_from_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the meta device, which autocast does not know, tensors have no values: what asks for one
    # raises.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    method = build(name).to("meta")
    features, labels, scores = random_batch()
    features = {n: x.to("meta").requires_grad_() for n, x in features.items()}
    if waits_of(name):
        with pytest.raises(RuntimeError, match="meta"):
            run(method, (features, labels, scores.to("meta")))
        return
    sum(run(method, (features, labels, scores.to("meta"))).losses.values()).backward()


def test_statistics_can_be_copied_and_saved() -> None:
    output = run(build("ms_cs"), random_batch())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(output.statistics)))
    torch.testing.assert_close(copied, dict(output.statistics), equal_nan=True)


@pytest.mark.gpu
def test_the_host_waits_for_the_gpu_as_often(name: str) -> None:
    method = build(name).cuda()
    features, labels, scores = random_batch()
    batch = {n: x.cuda() for n, x in features.items()}, labels, scores.cuda()
    waits = gpu_waits(lambda: sum(method(*batch).losses.values()).backward())
    assert waits == waits_of(name)


def test_a_second_derivative_is_refused(name: str) -> None:
    features, labels, scores = random_batch()
    features = {n: x.requires_grad_() for n, x in features.items()}
    losses = run(build(name), (features, labels, scores)).losses
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, list(features.values()), create_graph=True, allow_unused=True)


def test_a_compiled_step_breaks_its_graph_once() -> None:
    for name in ("ms_cs", "ms_cs sampled", "sum"):
        method, batch = build(name), random_batch()
        expected = run(copy.deepcopy(method), batch)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        output = run(torch.compile(method, backend="aot_eager"), batch)
        assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1, name
        torch.testing.assert_close(output.losses, expected.losses)
        assert all(x.isfinite().all() for x in gradients(output.losses, method))


def test_wrong_input_is_named() -> None:
    method = multi_scale(negatives=BoundaryNegatives(K))
    features, labels, scores = random_batch()
    tokens = {**features, "res5": features["res5"].flatten(2).mT}
    one_hot = nn.functional.one_hot(labels.clamp(max=K - 1), K).movedim(3, 1)
    unknown = labels.clone()
    unknown[labels == 255] = K + 2
    cases = {
        r"features.*list": (list(features.values()), labels, scores),
        r"features\['res5'\].*\(2, 16, 8\)": (tokens, labels, scores),
        r"labels.*float32": (features, labels.float(), scores),
        r"labels.*\(2, 4, 128, 128\)": (features, one_hot, scores),
        r"features\['res2'\].*2.*1": (features, labels[:1], scores[:1]),
        r"logits.*1.*2": (features, labels, scores[:1]),
        r"32x32.*128x64": (features, labels[:, :, :64], scores),
        r"5 classes.*num_classes=4": (features, labels, torch.cat([scores, scores[:, :1]], 1)),
        r"labels hold 6.*num_classes=4": (features, unknown, scores),
        r"'res4'.*\['res2', 'res3', 'res5'\]": (
            {n: x for n, x in features.items() if n != "res4"},
            labels,
            scores,
        ),
        r"logits=None": (features, labels, None),
    }
    for message, batch in cases.items():
        with pytest.raises(ValueError, match=message):
            method(*batch)
    assert method(features, unknown, scores, ignore_label=K + 2).losses
    assert method({**features, "pooled": torch.zeros(2, 9)}, labels, scores).losses
    with pytest.raises(ValueError, match="layer.1"):
        ms_cs({"layer.1": 8}, K)
    with pytest.raises(ValueError, match="'res6'.*'res5'"):
        ms_cs(CHANNELS, K, scale_weights={"res6": 1.0})


def test_a_class_can_be_the_ignored_label(name: str) -> None:
    features, labels, scores = random_batch()
    labels = labels.to(torch.uint8)
    void = torch.where(labels == 1, 255, labels).to(torch.uint8)
    expected = run(build(name), (features, void, scores))
    generator = torch.Generator().manual_seed(1)
    as_one = torch.where(void == 255, 1, void).to(torch.uint8)
    output = build(name)(features, as_one, scores, ignore_label=1, generator=generator)
    torch.testing.assert_close(output.losses, expected.losses)
    torch.testing.assert_close(output.statistics, expected.statistics, equal_nan=True)


def test_presets_take_any_maps() -> None:
    """Weights and pairs follow the order of the maps."""
    method = ms_cs({"p2": 8, "p3": 8, "p4": 8, "p5": 8}, K)
    found = [(pair.name, round(pair.weight, 6)) for pair in method.pairs]
    assert found == [
        ("p2", 0.1),
        ("p3", 0.07),
        ("p4", 0.04),
        ("p5", 0.01),
        ("p2_p5", 0.1),
        ("p2_p4", 0.1),
    ]
    assert [pair.name for pair in ms_cs({"a": 8, "b": 8}, K).pairs] == ["a", "b", "a_b"]
    assert [pair.name for pair in ms_cs({"a": 8}, K).pairs] == ["a"]
    assert pne({"x": 8}, K).names == ("x",)
    for preset in (pne, pne_release, pixel_contrast, pixel_contrast_release):
        with pytest.raises(ValueError, match=r"feature=None.*\['a', 'b'\]"):
            preset({"a": 8, "b": 8}, K)


def test_presets_differ_by_what_their_names_say() -> None:
    floors = [preset({"a": 8}, K).sampler.min_per_class for preset in (ms_cs, ms_cs_paper)]
    assert floors == [32, 0]
    gates = [(m.max_hard, m.official_code) for m in (pne({"a": 8}, K), pne_release({"a": 8}, K))]
    assert gates == [(199 / 8192, False), (199, True)]
    # Of one anchor a half is none, so that it is a right one.
    for most, hard in ((100, 0.5), (1, 0.0)):
        sampler = pixel_contrast_release({"a": 8}, K, max_per_group=most).sampler
        assert (sampler.hard_share, sampler.min_pixels) == (hard, most + 1)


def test_a_zero_reaches_everything_and_ignores_values() -> None:
    tensors = [torch.tensor([torch.inf, 1.0]), torch.tensor([[torch.nan]]), torch.zeros(0, 3)]
    for tensor in tensors:
        tensor.requires_grad_()
    zero = connected_zero(tensors)
    zero.backward()
    assert zero == 0 and all((x.grad == 0).all() for x in tensors)
