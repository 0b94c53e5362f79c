"""Sampled projection in two gloo processes against one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contrast_d2.contrast import BalancedSampler, MultiScaleContrast, MultiScaleProjector

from ..helpers import run_processes

CHANNELS = {"res2": 4, "res3": 5}
SIZES = {"res2": 8, "res3": 4}
# Images of each rank, and those that hold ignored pixels only.
SPLIT = [slice(0, 1), slice(1, 4)]
BLANK = {"none": [], "first rank": [0], "second rank": [1, 2, 3], "all": [0, 1, 2, 3]}
SYNCHRONISED = [(norm_statistics, blank) for norm_statistics in ("map", "draw") for blank in BLANK]
SEPARATE = [("map", "none"), ("map", "first rank"), ("draw", "none"), ("draw", "second rank")]


def build(norm_statistics: str, across_processes: bool) -> MultiScaleContrast:
    torch.manual_seed(0)
    # At this floor every pixel is drawn, so that chance plays no part.
    return MultiScaleContrast(
        MultiScaleProjector(CHANNELS, 6, num_hidden=2),
        BalancedSampler(4, max_anchors=10**6, floor=10**5, across_processes=across_processes),
        scale_weights={"res2": 1.0, "res3": 0.7},
        cross_scale=[("res2", "res3", 1.0)],
        across_processes=across_processes,
        projection="sampled",
        norm_statistics=norm_statistics,
    ).double()


def make_batch(blank: str) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(1)
    features = {
        name: torch.randn(4, c, SIZES[name], SIZES[name], dtype=torch.float64)
        for name, c in CHANNELS.items()
    }
    labels = torch.randint(0, 4, (4, 16, 16))
    labels[:, :4] = 255
    labels[BLANK[blank]] = 255
    return features, labels


def run(contrast: nn.Module, features: dict[str, Tensor], labels: Tensor) -> dict:
    features = {name: f.clone().requires_grad_() for name, f in features.items()}
    output = contrast(features, None, labels)
    sum(output.losses.values()).backward()
    return {
        "losses": {name: loss.detach() for name, loss in output.losses.items()},
        "parameters": {n.removeprefix("module."): p.grad for n, p in contrast.named_parameters()},
        "buffers": {n.removeprefix("module."): b for n, b in contrast.named_buffers()},
        "features": {name: f.grad for name, f in features.items()},
    }


def run_rank() -> dict:
    """All cases in one pair of processes, since starting them takes the longest."""
    results: dict[str, dict] = {"synchronised": {}, "separate": {}}
    images = SPLIT[dist.get_rank()]
    for case in SYNCHRONISED:
        features, labels = make_batch(case[1])
        contrast = nn.SyncBatchNorm.convert_sync_batchnorm(build(case[0], True))
        own = {name: f[images] for name, f in features.items()}
        # DistributedDataParallel refuses synchronised norms on a CPU: average here.
        results["synchronised"][case] = run(contrast, own, labels[images])
        for gradient in results["synchronised"][case]["parameters"].values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    for case in SEPARATE:
        features, labels = make_batch(case[1])
        contrast = DistributedDataParallel(build(case[0], False), broadcast_buffers=False)
        own = {name: f[images] for name, f in features.items()}
        results["separate"][case] = run(contrast, own, labels[images])
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_processes(run_rank, 2)


def assert_close(found: dict, expected: dict) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", SYNCHRONISED, ids=" - ".join)
def test_synchronised_statistics_are_those_of_the_global_batch(
    ranks: list[dict], case: tuple[str, str]
) -> None:
    one = run(build(case[0], False), *make_batch(case[1]))
    two = [rank["synchronised"][case] for rank in ranks]
    assert all((loss > 0) == (case[1] != "all") for loss in one["losses"].values())
    for name, loss in one["losses"].items():
        torch.testing.assert_close((two[0]["losses"][name] + two[1]["losses"][name]) / 2, loss)
    for rank in two:
        assert_close(rank["parameters"], one["parameters"])
        assert_close(rank["buffers"], one["buffers"])
    for name, gradient in one["features"].items():
        # Each process holds twice its share, since DistributedDataParallel takes the mean.
        both = torch.cat([two[0]["features"][name], two[1]["features"][name]])
        torch.testing.assert_close(both, 2 * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", SEPARATE, ids=" - ".join)
def test_other_norms_stay_with_their_process(ranks: list[dict], case: tuple[str, str]) -> None:
    features, labels = make_batch(case[1])
    alone = [
        run(build(case[0], False), {n: f[images] for n, f in features.items()}, labels[images])
        for images in SPLIT
    ]
    mean = {
        name: (gradient + alone[1]["parameters"][name]) / 2
        for name, gradient in alone[0]["parameters"].items()
    }
    for rank, expected in zip(ranks, alone, strict=True):
        found = rank["separate"][case]
        assert_close(found["losses"], expected["losses"])
        assert_close(found["buffers"], expected["buffers"])
        assert_close(found["parameters"], mean)
    if case[1] != "none":
        blank = ["first rank", "second rank"].index(case[1])
        assert not any(loss for loss in ranks[blank]["separate"][case]["losses"].values())
