"""Random cases for every contrast method: batches as bad as they come, and all of its options.

Shape letters: B images, C channels, K classes, D embedding width, H W the labels, h w a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2.contrast import (
    PNE,
    BalancedSampler,
    BoundaryNegatives,
    Contextrast,
    ContextrastPlus,
    ContrastMethod,
    ContrastSum,
    HardAnchorSampler,
    MemoryBank,
    MultiScaleContrast,
    MultiScaleProjector,
    PixelContrast,
    SemiHardPairs,
)

CHANNELS = {"res2": 3, "res3": 4, "res4": 6}
STRIDES = {"res2": 2, "res3": 4, "res4": 8}

# fp16 holds nothing above 65504: what overflows there is the network's, and the scaler's affair.
_LARGEST_EXPONENT = {"fp64": 20, "fp32": 20, "bf16": 20, "fp16": 3}
# Of features that PyTorch's norm layers take: their variances are in fp32.
_LARGEST_TO_NORMALISE = 15
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Batch:
    """How the batches of a case are made.

    Attributes:
        seed: of all random numbers of the case.
        num_classes, images, height, width: K, B, H, W.
        layout: "noise", "blocks", "one_class", or "specks", single pixels on one class.
        ignored: share of the pixels that are ignored.
        ignored_label: what they hold.
        vectors: "random", "constant", or "mixed", with lengths from one extreme to the other.
        exponent: features are of the order of 10 to this power; None for zeros.
        accuracy: share of the pixels that are predicted right, up to resizing.
        logit_scale: of the class scores.
        fine_logits: scores as fine as the labels, else as the finest map.
        precision: "fp32", "fp64", or autocast to "bf16" or "fp16".
        channels_last: memory format of the features.
        steps: training steps.
    """

    seed: int
    num_classes: int
    images: int = 2
    height: int = 32
    width: int = 32
    layout: str = "blocks"
    ignored: float = 0.1
    ignored_label: int = 255
    vectors: str = "random"
    exponent: int | None = 0
    accuracy: float = 0.5
    logit_scale: float = 5.0
    fine_logits: bool = False
    precision: str = "fp32"
    channels_last: bool = False
    steps: int = 1


@dataclass(frozen=True)
class Case:
    """A method with its options, and what it is fed.

    Attributes:
        method: key of `BUILDERS`.
        batch: the input.
        projector: options of `MultiScaleProjector`.
        options: of the method.
        parts: options of its sampler, memory and so on, by name.
        methods: those of a sum.
    """

    method: str
    batch: Batch
    projector: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    methods: tuple[Case, ...] = ()


# --- Batches


@st.composite
def batches(draw: st.DrawFn, most_steps: int = 1) -> Batch:
    precision = draw(st.sampled_from(["fp32", "fp64", "bf16", "fp16"]))
    largest = _LARGEST_EXPONENT[precision]
    sides = st.sampled_from([24, 40, 33, 7, 1]) | st.integers(1, 40)
    return Batch(
        seed=draw(st.integers(0, 2**32 - 1)),
        num_classes=draw(st.sampled_from([2, 3, 5, 19])),
        images=draw(st.integers(2, 3)),
        height=draw(sides),
        width=draw(sides),
        layout=draw(st.sampled_from(["noise", "blocks", "specks", "one_class"])),
        ignored=draw(st.sampled_from([0.0, 0.2, 0.5, 0.99, 1.0]) | st.floats(0, 1, width=16)),
        ignored_label=draw(st.sampled_from([255, -1, 19])),
        vectors=draw(st.sampled_from(["random", "mixed", "constant"])),
        exponent=draw(st.sampled_from([0, 1, -20, largest, None]) | st.integers(-20, largest)),
        accuracy=draw(st.sampled_from([0.5, 0.9, 0.0, 1.0])),
        logit_scale=draw(st.sampled_from([5.0, 1e4, 1e-3, 0.0])),
        fine_logits=draw(st.booleans()),
        precision=precision,
        channels_last=draw(st.booleans()),
        steps=draw(st.integers(1, most_steps)),
    )


def make_labels(batch: Batch, generator: torch.Generator) -> Tensor:
    """(B, H, W) int64."""
    size = (batch.images, batch.height, batch.width)

    def classes(*shape: int) -> Tensor:
        return torch.randint(batch.num_classes, shape, generator=generator)

    labels = classes(*size)
    if batch.layout == "blocks":
        coarse = classes(batch.images, 1, 3, 3).float()
        labels = F.interpolate(coarse, size=size[1:]).long()[:, 0]
    elif batch.layout != "noise":
        speck = torch.rand(size, generator=generator) < 3 / (batch.height * batch.width)
        labels = labels.where(speck & (batch.layout == "specks"), classes(1))
    ignored = torch.rand(size, generator=generator) < batch.ignored
    return labels.masked_fill(ignored, batch.ignored_label)


def make_logits(batch: Batch, labels: Tensor, generator: torch.Generator) -> Tensor:
    """(B, K, h', w') scores that name the label's class in a share of the pixels."""
    shape = labels.shape
    guess = torch.randint(batch.num_classes, shape, generator=generator)
    known = (labels >= 0) & (labels < batch.num_classes)
    right = known & (torch.rand(shape, generator=generator) < batch.accuracy)
    scores = F.one_hot(labels.where(right, guess), batch.num_classes).permute(0, 3, 1, 2).float()
    scores += 0.1 * torch.rand(scores.shape, generator=generator)
    if not batch.fine_logits:
        scores = F.interpolate(scores, size=_size(batch, "res2"))
    return batch.logit_scale * scores


def make_features(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Maps (B, C, h, w) that require a gradient."""
    batch = case.batch
    largest = _LARGEST_EXPONENT[batch.precision]
    if case.projector["num_hidden"] > 0 and case.projector.get("norm", "batch") is not None:
        largest = min(largest, _LARGEST_TO_NORMALISE)
    features = {}
    for name, channels in CHANNELS.items():
        shape = (batch.images, channels, *_size(batch, name))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if batch.vectors == "constant":
            x = x[:1, :, :1, :1].expand(shape).clone()
        if batch.vectors == "mixed":
            spread = torch.rand(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64)
            x *= 10 ** (-20 + (largest + 20) * spread)
        else:
            x *= 0 if batch.exponent is None else 10.0 ** min(batch.exponent, largest)
        x = x.to(torch.float64 if batch.precision == "fp64" else torch.float32)
        x = x.to(_AUTOCAST.get(batch.precision, x.dtype))
        if batch.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        features[name] = x.requires_grad_()
    return features


def _size(batch: Batch, name: str) -> tuple[int, int]:
    stride = STRIDES[name]
    return -(-batch.height // stride), -(-batch.width // stride)


# --- Options


temperatures = st.one_of(st.sampled_from([0.01, 0.07, 0.1, 1.0]), st.floats(0.01, 1.0))
weights = st.sampled_from([1e-3, 0.1, 1.0])


@st.composite
def projectors(draw: st.DrawFn, dense: bool = True) -> dict[str, Any]:
    return {
        "embed_dim": draw(st.sampled_from([1, 2, 8])),
        "num_hidden": draw(st.integers(0, 2)),
        "norm": draw(st.sampled_from(["batch", "layer", None])),
        "order": draw(st.sampled_from(["relu_norm", "norm_relu"])),
        "projection": "dense" if dense else draw(st.sampled_from(["dense", "sampled"])),
    }


def boundary_options() -> st.SearchStrategy[dict[str, Any] | None]:
    options = {
        "fraction": st.sampled_from([0.01, 0.5, 1.0]),
        "max_negatives": st.sampled_from([1, 7, 4096]),
    }
    return st.none() | st.fixed_dictionaries(options)


def samplers(draw: st.DrawFn, batch: Batch) -> dict[str, Any]:
    least = 2 * batch.num_classes
    return {
        "balance": draw(st.sampled_from(["class", "image_class"])),
        "max_anchors": draw(st.sampled_from([least, least + 20, 10_000])),
        "min_pixels": draw(st.sampled_from([1, 5])),
    }


@st.composite
def multi_scale(draw: st.DrawFn) -> Case:
    batch = draw(batches())
    names = list(CHANNELS)
    scales = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    pairs = [(a, b) for a in names for b in names if a != b]
    cross = draw(st.lists(st.sampled_from(pairs), unique=True, min_size=not scales, max_size=3))
    sampler = {
        **samplers(draw, batch),
        "max_per_group": draw(st.sampled_from([None, 2, 10])),
        "min_per_class": draw(st.sampled_from([0, 5])),
    }
    options = {
        "scale_weights": {name: draw(weights) for name in scales},
        "cross_scale": [(a, b, draw(weights)) for a, b in cross],
        "temperature": draw(temperatures),
        "count_empty_anchors": draw(st.booleans()),
        "warmup_iters": draw(st.sampled_from([0, 0, 1])),
    }
    parts = {"sampler": sampler, "negatives": draw(boundary_options())}
    return Case("multi_scale", batch, draw(projectors(dense=False)), options, _given(parts))


@st.composite
def pixel(draw: st.DrawFn) -> Case:
    batch = draw(batches(most_steps=4))
    sampler = {
        **samplers(draw, batch),
        "max_per_group": draw(st.sampled_from([1, 2, 50])),
        "hard_share": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "fill_from": draw(st.sampled_from(["random", "easy"])),
    }
    parts = {
        "sampler": sampler,
        "memory": draw(st.none() | memories()),
        "pairs": draw(st.none() | semi_hard_pairs()),
    }
    if parts["pairs"] is None:
        parts["negatives"] = draw(boundary_options())
    options = {
        "feature": draw(st.sampled_from(list(CHANNELS))),
        "temperature": draw(temperatures),
        "warmup_iters": draw(st.integers(0, 2)),
    }
    projector = draw(projectors(dense=parts["memory"] is not None))
    return Case("pixel", batch, projector, options, _given(parts))


def memories() -> st.SearchStrategy[dict[str, Any]]:
    """Banks from a part filled to wrapped around, in up to four steps."""
    options = {
        "regions_per_class": st.sampled_from([0, 1, 3, 50]),
        "pixels_per_class": st.sampled_from([2, 8, 200]),
        "pixels_per_image": st.sampled_from([1, 2]),
        "max_keys": st.sampled_from([None, 1, 15]),
        "dtype": st.sampled_from(["fp32", "fp16"]),
    }
    return st.fixed_dictionaries(options)


def semi_hard_pairs() -> st.SearchStrategy[dict[str, Any]]:
    options = {
        "fraction": st.sampled_from([0.01, 0.1, 1.0]),
        "max_positives": st.sampled_from([1, 5, 1024]),
        "max_negatives": st.sampled_from([1, 5, 2048]),
    }
    return st.fixed_dictionaries(options)


def layers(draw: st.DrawFn, least: int) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(list(CHANNELS)), unique=True, min_size=least))
    return {
        "layers": {name: draw(weights) for name in names},
        "temperature": draw(temperatures),
        "deepest_weight": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "warmup_iters": draw(st.integers(0, 1)),
    }


@st.composite
def contextrast(draw: st.DrawFn) -> Case:
    options = {
        **layers(draw, 1),
        "boundary_fraction": draw(st.sampled_from([0.01, 0.5, 1.0])),
        "negatives": draw(st.sampled_from(["other_classes", "false_positives", "own_class"])),
    }
    return Case("contextrast", draw(batches(most_steps=3)), draw(projectors()), options)


@st.composite
def contextrast_plus(draw: st.DrawFn) -> Case:
    options = {**layers(draw, 2), "anchor_memory": draw(st.sampled_from([1, 2, 100]))}
    return Case("contextrast_plus", draw(batches(most_steps=3)), draw(projectors()), options)


@st.composite
def pne(draw: st.DrawFn) -> Case:
    options = {
        "feature": draw(st.sampled_from(list(CHANNELS))),
        "temperature": draw(temperatures),
        "samples_per_group": draw(st.sampled_from([1, 3, 100])),
        "max_hard": draw(st.sampled_from([1.0, 0.3, 1, 50])),
        "official_code": draw(st.booleans()),
        "warmup_iters": draw(st.integers(0, 1)),
    }
    return Case("pne", draw(batches(most_steps=2)), draw(projectors()), options)


@st.composite
def contrast_sum(draw: st.DrawFn) -> Case:
    """Two or three methods, with the batch and the heads of the first."""
    chosen = draw(
        st.lists(
            st.sampled_from([multi_scale, pixel, contextrast, contextrast_plus, pne]),
            unique=True,
            min_size=2,
            max_size=3,
        )
    )
    cases = [draw(strategy()) for strategy in chosen]
    first, methods = cases[0], []
    for case in cases:
        parts = {name: dict(part) for name, part in case.parts.items()}
        if "sampler" in parts:
            parts["sampler"]["max_anchors"] = 2 * first.batch.num_classes + 10
        projector = {**first.projector, "projection": case.projector["projection"]}
        methods.append(replace(case, batch=first.batch, projector=projector, parts=parts))
    return Case("sum", first.batch, first.projector, methods=tuple(methods))


def _given(parts: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Mapping[str, Any]]:
    return {name: part for name, part in parts.items() if part is not None}


# --- Methods


def _projector(case: Case) -> MultiScaleProjector:
    return MultiScaleProjector(CHANNELS, **case.projector)


def _negatives(case: Case) -> BoundaryNegatives | None:
    if "negatives" not in case.parts:
        return None
    return BoundaryNegatives(case.batch.num_classes, **case.parts["negatives"])


def _multi_scale(case: Case) -> ContrastMethod:
    sampler = BalancedSampler(case.batch.num_classes, **case.parts["sampler"])
    return MultiScaleContrast(_projector(case), sampler, negatives=_negatives(case), **case.options)


def _pixel(case: Case) -> ContrastMethod:
    classes, parts = case.batch.num_classes, case.parts
    memory = pairs = None
    if "memory" in parts:
        memory = MemoryBank(classes, case.projector["embed_dim"], **parts["memory"])
    if "pairs" in parts:
        pairs = SemiHardPairs(**parts["pairs"])
    return PixelContrast(
        _projector(case),
        HardAnchorSampler(classes, **parts["sampler"]),
        memory=memory,
        pairs=pairs,
        negatives=_negatives(case),
        **case.options,
    )


def _plain(method: type[ContrastMethod], case: Case) -> ContrastMethod:
    return method(_projector(case), case.batch.num_classes, **case.options)


def _sum(case: Case) -> nn.Module:
    return ContrastSum({part.method: BUILDERS[part.method](part) for part in case.methods})


BUILDERS: dict[str, Callable[[Case], nn.Module]] = {
    "multi_scale": _multi_scale,
    "pixel": _pixel,
    "contextrast": partial(_plain, Contextrast),
    "contextrast_plus": partial(_plain, ContextrastPlus),
    "pne": partial(_plain, PNE),
    "sum": _sum,
}
STRATEGIES: dict[str, st.SearchStrategy[Case]] = {
    "multi_scale": multi_scale(),
    "pixel": pixel(),
    "contextrast": contextrast(),
    "contextrast_plus": contextrast_plus(),
    "pne": pne(),
    "sum": contrast_sum(),
}


def run_case(case: Case) -> bool:
    """Trains a method for the steps of a case, without updates, and checks all that comes out.

    Returns:
        Whether any loss was above 0.

    Raises:
        AssertionError: a loss, gradient or buffer that is not finite, or a gradient that is not
            there.
    """
    batch = case.batch
    torch.manual_seed(batch.seed)
    generator = torch.Generator().manual_seed(batch.seed)
    method = BUILDERS[case.method](case)
    if batch.precision == "fp64":
        method.double()
    counted = False
    for _ in range(batch.steps):
        labels = make_labels(batch, generator)
        logits = make_logits(batch, labels, generator)
        features = make_features(case, generator)
        low = _AUTOCAST.get(batch.precision)
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            losses = method(
                features, labels, logits, ignore_label=batch.ignored_label, generator=generator
            ).losses
        for name, loss in losses.items():
            assert loss.shape == () and loss.isfinite(), f"{name} = {loss}"
        counted |= any(loss.item() > 0 for loss in losses.values())
        method.zero_grad()
        torch.stack([loss.double() for loss in losses.values()]).sum().backward()
        for name, parameter in method.named_parameters():
            assert parameter.grad is not None, f"no gradient of {name}"
            assert parameter.grad.isfinite().all(), f"gradient of {name}"
        for name in tapped(method):
            grad = features[name].grad
            assert grad is not None, f"no gradient of {name}"
            assert grad.isfinite().all(), f"gradient of {name}"
        for name, buffer in method.named_buffers():
            assert not buffer.is_floating_point() or buffer.isfinite().all(), name
    return counted


def tapped(method: nn.Module) -> set[str]:
    """Feature maps that the method has a head for."""
    return {
        name
        for module in method.modules()
        if isinstance(module, MultiScaleProjector)
        for name in module.heads
    }
