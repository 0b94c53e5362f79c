"""Contextrast in two gloo processes against one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contrast_d2.contrast import MultiScaleProjector
from contrast_d2.contrast.contextual import Contextrast

from ..helpers import run_processes

CHANNELS = {"res2": 4, "res3": 5, "res5": 6}
SIZES = {"res2": 8, "res3": 4, "res5": 2}
NUM_CLASSES = 5
SPLITS = {"even": [2, 2], "uneven": [1, 3]}
# Images that hold ignored pixels only.
BLANK = {"none": [], "second rank": [2, 3], "all": [0, 1, 2, 3]}
OPTIONS = {
    "default": {},
    "min_pixels": {"min_pixels": 3, "detach_deepest": True},
    "plus": {"fusion": "adaptive", "anchor_memory": 4},
}
CASES = [
    ("even", "none", "default"),
    ("uneven", "none", "min_pixels"),
    ("uneven", "none", "plus"),
    ("even", "second rank", "plus"),
    ("even", "all", "plus"),
]


def build(options: str, *, across_processes: bool) -> Contextrast:
    torch.manual_seed(0)
    # Without hidden layers, whose norms would see other statistics; and with all wrong pixels, so
    # that chance plays no part.
    contrast = Contextrast(
        MultiScaleProjector(CHANNELS, 6, num_hidden=0),
        NUM_CLASSES,
        layers={"res2": 0.1, "res3": 0.4, "res5": 1.0},
        boundary_fraction=1.0,
        across_processes=across_processes,
        **OPTIONS[options],
    ).double()
    if contrast.fusion is not None:
        for parameter in contrast.fusion.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return contrast


def make_batch(blank: str, seed: int = 1) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    torch.manual_seed(seed)
    features = {
        name: torch.randn(4, c, SIZES[name], SIZES[name], dtype=torch.float64)
        for name, c in CHANNELS.items()
    }
    labels = torch.randint(0, 4, (4, 16, 16))
    labels[:, 1:3] = 255
    labels[0, 4, 0] = 4  # class 4: one pixel, of one process
    labels[BLANK[blank]] = 255
    return features, torch.randn(4, NUM_CLASSES, 8, 8), labels


def run(contrast: torch.nn.Module, features: dict, scores: Tensor, labels: Tensor) -> dict:
    features = {name: f.clone().requires_grad_() for name, f in features.items()}
    for p in contrast.parameters():
        p.grad = None
    output = contrast(features, scores, labels)
    sum(output.losses.values()).backward()
    return {
        "losses": {name: loss.detach() for name, loss in output.losses.items()},
        "parameters": [p.grad for p in contrast.parameters()],
        "features": {name: f.grad for name, f in features.items()},
        "buffers": {n.removeprefix("module."): b.clone() for n, b in contrast.named_buffers()},
    }


def run_rank() -> dict:
    """All cases in one pair of processes, since starting them takes the longest."""
    results = {}
    for split, blank, options in CASES:
        sizes, rank = SPLITS[split], dist.get_rank()
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        contrast = DistributedDataParallel(build(options, across_processes=True))
        for step in (1, 2):  # the second step has anchors to contrast with
            features, scores, labels = make_batch(blank, step)
            own_features = {name: f[own] for name, f in features.items()}
            result = run(contrast, own_features, scores[own], labels[own])
        results[split, blank, options] = result
    # Each process with anchors of its own. Buffers are not broadcast: they are equal by themselves.
    contrast = build("plus", across_processes=False)
    for step in (1, 2, 3):
        features, scores, labels = make_batch("none", step)
        own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        run(contrast, {n: f[own] for n, f in features.items()}, scores[own], labels[own])
    results["memory"] = dict(contrast.memory.named_buffers())
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_processes(run_rank, 2)


@pytest.mark.parametrize("case", CASES, ids=" - ".join)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[dict], case: tuple) -> None:
    split, blank, options = case
    contrast = build(options, across_processes=True)
    for step in (1, 2):
        one = run(contrast, *make_batch(blank, step))
    two = [rank[case] for rank in ranks]
    exact = {"rtol": 1e-9, "atol": 1e-13}
    for name, loss in one["losses"].items():
        # The trainer logs the mean over the processes.
        torch.testing.assert_close((two[0]["losses"][name] + two[1]["losses"][name]) / 2, loss)
        assert (loss > 0) == (blank != "all"), name
    for rank in two:
        torch.testing.assert_close(rank["parameters"], one["parameters"], **exact)
        torch.testing.assert_close(rank["buffers"], one["buffers"], **exact)
    for name, gradient in one["features"].items():
        # DistributedDataParallel averages the parameters' gradients, not those of its inputs.
        both = torch.cat([rank["features"][name] for rank in two]) / 2
        torch.testing.assert_close(both, gradient, **exact)


def test_processes_with_anchors_of_their_own_share_a_memory(ranks: list[dict]) -> None:
    first, second = (rank["memory"] for rank in ranks)
    for name, buffer in first.items():
        assert buffer.equal(second[name]), name
    expected = build("plus", across_processes=False)
    halves = [build("plus", across_processes=False) for _ in range(2)]
    for step in (1, 2, 3):
        features, scores, labels = make_batch("none", step)
        for rank, half in enumerate(halves):
            own = slice(2 * rank, 2 * rank + 2)
            run(half, {n: f[own] for n, f in features.items()}, scores[own], labels[own])
            for n in range(NUM_CLASSES):
                # What the half has just stored, in the order of ranks.
                there = (labels[own][:, ::2, ::2] == n).any()
                if there:
                    slot = int(half.memory.pointers[n] - 1) % 4
                    exists = torch.zeros(1, NUM_CLASSES, dtype=torch.bool)
                    exists[0, n] = True
                    expected.memory.push(half.memory.anchors[:, slot][None], exists)
    assert expected.memory.fills.tolist() == [4, 4, 4, 4, 3]
    for name, buffer in expected.memory.named_buffers():
        torch.testing.assert_close(buffer, first[name])
