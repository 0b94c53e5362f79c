"""Every method on one global batch, however many processes share it.

Shape letters: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contrast_d2.contrast import (
    PNE,
    BalancedSampler,
    BoundaryNegatives,
    CentreRegulariser,
    Contextrast,
    ContextrastPlus,
    ContrastSum,
    FixedPrototypes,
    HardAnchorSampler,
    MemoryBank,
    MultiScaleContrast,
    MultiScaleProjector,
    PixelContrast,
    RegionContrast,
)

NUM_CLASSES = 5
NUM_IMAGES = 8
CHANNELS = {"res2": 4, "res3": 6}
SIZES = {"res2": 8, "res3": 4}
# How many images each process has.
SPLITS = {2: [3, 5], 4: [1, 3, 2, 2]}
STEPS = 2
# Budgets above the number of pixels, so that nothing is left to chance.
ALL = 10**6
REGIONS, PIXELS = 10, 1100  # per class, in the bank; all pixels of two steps fit in

# Largest differences of losses and gradients, over the largest value: sums in another order. Those
# found are a hundredth (fp64) and a tenth (fp32) of these.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

Result = dict[str, dict[str, Tensor]]
# Method, scene, precision.
Case = tuple[str, str, torch.dtype]


def _projector() -> MultiScaleProjector:
    # Without hidden layers, whose batch norms would see the images of one process.
    return MultiScaleProjector(CHANNELS, 6, num_hidden=0)


def _boundary() -> BoundaryNegatives:
    return BoundaryNegatives(NUM_CLASSES, fraction=1.0, max_negatives=ALL)


def _multiscale(**options: Any) -> MultiScaleContrast:
    return MultiScaleContrast(
        _projector(),
        BalancedSampler(NUM_CLASSES, max_anchors=ALL, min_per_class=ALL),
        scale_weights={"res2": 1.0, "res3": 0.7},
        cross_scale=[("res2", "res3", 0.5), ("res3", "res2", 0.3)],
        weight=1.0,
        across_processes=True,
        **options,
    )


def _pixel(**options: Any) -> PixelContrast:
    sampler = HardAnchorSampler(NUM_CLASSES, max_anchors=ALL, max_per_group=ALL)
    return PixelContrast(
        _projector(), sampler, feature="res2", weight=1.0, across_processes=True, **options
    )


def _memory(**options: Any) -> MemoryBank:
    return MemoryBank(
        NUM_CLASSES,
        6,
        regions_per_class=REGIONS,
        pixels_per_class=PIXELS,
        pixels_per_image=100,
        **options,
    )


def _region() -> RegionContrast:
    memory = MemoryBank(NUM_CLASSES, 6, regions_per_class=2 * NUM_IMAGES, pixels_per_class=0)
    return RegionContrast(_projector(), NUM_CLASSES, memory, feature="res2", across_processes=True)


def _fixed() -> FixedPrototypes:
    sampler = BalancedSampler(NUM_CLASSES, max_anchors=ALL, min_per_class=ALL)
    return FixedPrototypes(_projector(), sampler, feature="res2", across_processes=True)


def _centres() -> CentreRegulariser:
    return CentreRegulariser(_projector(), NUM_CLASSES, feature="res2", across_processes=True)


def _contextrast(method: type[Contextrast], **options: Any) -> Contextrast:
    layers = {"res2": 0.4, "res3": 1.0}
    return method(_projector(), NUM_CLASSES, layers=layers, across_processes=True, **options)


def _plus() -> Contextrast:
    method = _contextrast(ContextrastPlus, anchor_memory=4)
    method.boundary_fraction = 1.0  # not an option of it
    return method


def _pne() -> PNE:
    return PNE(
        _projector(),
        NUM_CLASSES,
        feature="res2",
        samples_per_group=1000,
        max_hard=1.0,
        across_processes=True,
    )


METHODS: dict[str, Callable[[], nn.Module]] = {
    "multi- and cross-scale": _multiscale,
    "multi-scale, empty anchors": lambda: _multiscale(count_empty_anchors=True),
    "multi-scale, boundary negatives": lambda: _multiscale(negatives=_boundary()),
    "pixel": _pixel,
    "pixel, memory": lambda: _pixel(memory=_memory()),
    "pixel, memory of correct ones": lambda: _pixel(memory=_memory(admission="correct")),
    "pixel, boundary negatives": lambda: _pixel(negatives=_boundary()),
    "Contextrast": lambda: _contextrast(Contextrast, boundary_fraction=1.0),
    "Contextrast++": _plus,
    "PNE": _pne,
    "region, memory": _region,
    "fixed prototypes": _fixed,
    "centres": _centres,
    "sum": lambda: ContrastSum({"ms": _multiscale(), "pixel": _pixel(), "pne": _pne()}),
}

SCENES = ("common", "first process void", "second process void", "no class in common", "all void")


def make_batch(
    scene: str, split: list[int], step: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features, labels (B, 16, 16) and class scores of the global batch.

    Args:
        scene: one of `SCENES`; what is void or apart are the images of one process.
        split: images of each process.
        step: seed of the random numbers.
        dtype: of the features.
    """
    generator = torch.Generator().manual_seed(step)
    features = {
        name: torch.randn(
            NUM_IMAGES, c, SIZES[name], SIZES[name], generator=generator, dtype=torch.float64
        ).to(dtype)
        for name, c in CHANNELS.items()
    }
    scores = torch.randn(NUM_IMAGES, NUM_CLASSES, 8, 8, generator=generator)
    labels = torch.randint(0, NUM_CLASSES - 1, (NUM_IMAGES, 16, 16), generator=generator)
    labels[-1, 8, 8] = NUM_CLASSES - 1  # its only positive is its pixel of the other scale
    labels[:, :3] = 255
    process = torch.repeat_interleave(torch.arange(len(split)), torch.tensor(split))
    if scene == "first process void":
        labels[process == 0] = 255
    elif scene == "second process void":
        labels[process == 1] = 255
    elif scene == "no class in common":
        labels = torch.where(labels < NUM_CLASSES, process[:, None, None], labels)
    elif scene == "all void":
        labels[:] = 255
    return features, labels, scores


def run_steps(method: str, scene: str, split: list[int], dtype: torch.dtype) -> Result:
    """Losses, gradients and buffers of the last of some steps, in this process's part of the job.

    Without a process group, those of the whole batch.
    """
    torch.manual_seed(0)
    contrast = METHODS[method]().to(dtype)
    own, processes = slice(None), 1
    model: nn.Module = contrast
    if dist.is_initialized():
        rank, processes = dist.get_rank(), dist.get_world_size()
        own = slice(sum(split[:rank]), sum(split[: rank + 1]))
        model = DistributedDataParallel(contrast, broadcast_buffers=False)
    for step in range(STEPS):
        features, labels, scores = make_batch(scene, split, step, dtype)
        features = {name: f[own].clone().requires_grad_() for name, f in features.items()}
        model.zero_grad()
        losses = model(features, labels[own], scores[own]).losses
        sum(losses.values()).backward()
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "parameters": {name: p.grad for name, p in contrast.named_parameters()},
        # DistributedDataParallel divides the gradients of parameters, not those of features.
        "features": {n: f.grad / processes for n, f in features.items() if f.grad is not None},
        "buffers": {name: b.clone() for name, b in contrast.named_buffers()},
    }


def run_all(cases: Sequence[Case], split: list[int]) -> dict[Case, Result]:
    """Many cases in one process of several, since starting these takes the longest."""
    return {case: run_steps(*case[:2], split, case[2]) for case in cases}


def joined(ranks: list[Result]) -> Result:
    """The result of a job: the losses' mean, which the trainer logs, and all images' gradients."""
    first = ranks[0]
    return {
        "losses": {
            name: torch.stack([rank["losses"][name] for rank in ranks]).mean(dim=0)
            for name in first["losses"]
        },
        "parameters": first["parameters"],
        "features": {
            name: torch.cat([rank["features"][name] for rank in ranks])
            for name in first["features"]
        },
        "buffers": in_order(first["buffers"]),
    }


def in_order(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Buffers in which the pixel keys of a bank, all of which are drawn, are in a fixed order."""
    result = dict(buffers)
    for name, keys in buffers.items():
        if name.endswith("memory.keys") and len(keys) == NUM_CLASSES * (REGIONS + PIXELS):
            regions = keys[: REGIONS * NUM_CLASSES]
            pixels = keys[REGIONS * NUM_CLASSES :].view(NUM_CLASSES, PIXELS, -1)
            order = pixels[..., 0].argsort(dim=1)[..., None].expand_as(pixels)
            result[name] = torch.cat([regions, pixels.gather(1, order).flatten(0, 1)])
    return result


def difference(one: Result, several: Result) -> dict[str, float]:
    """The largest difference of losses, gradients and buffers, over the largest value of each."""
    one = {**one, "buffers": in_order(one["buffers"])}
    return {
        kind: max(
            (
                ((several[kind][name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
                .double()
                .item()
                for name, value in values.items()
                if value.numel()
            ),
            default=0.0,
        )
        for kind, values in one.items()
    }
