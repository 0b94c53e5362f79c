"""Contextrast in two gloo processes against one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contrast_d2.contrast import AnchorMemory, Contextrast, ContextrastPlus, MultiScaleProjector

from ..helpers import run_processes

CHANNELS = {"res2": 4, "res3": 5, "res5": 6}
SIZES = {"res2": 8, "res3": 4, "res5": 2}
NUM_CLASSES = 5
# The kind of method, the images of each process, and the images that hold ignored pixels only.
CASES = [
    (Contextrast, [2, 2], []),
    (ContextrastPlus, [1, 3], []),
    (ContextrastPlus, [2, 2], [2, 3]),
    (ContextrastPlus, [2, 2], [0, 1, 2, 3]),
]


def build(kind: type[Contextrast], *, across_processes: bool = True) -> Contextrast:
    torch.manual_seed(0)
    # Without hidden layers, whose norms would see other statistics.
    contrast = kind(
        MultiScaleProjector(CHANNELS, 6, num_hidden=0),
        NUM_CLASSES,
        layers={"res2": 0.1, "res3": 0.4, "res5": 1.0},
        across_processes=across_processes,
        **({"anchor_memory": 4} if kind is ContextrastPlus else {}),
    ).double()
    contrast.boundary_fraction = 1.0  # all wrong pixels: chance plays no part
    if isinstance(contrast, ContextrastPlus):
        for parameter in contrast.fusion.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return contrast


def run(contrast: torch.nn.Module, own: slice, blank: list[int], seed: int) -> dict:
    """One step with some images of a random batch."""
    torch.manual_seed(seed)
    features = {
        name: torch.randn(4, c, SIZES[name], SIZES[name], dtype=torch.float64)[own].requires_grad_()
        for name, c in CHANNELS.items()
    }
    labels = torch.randint(0, 4, (4, 16, 16))
    labels[:, 1:3] = 255
    labels[0, 4, 0] = 4  # class 4: one pixel, of one process
    labels[blank] = 255
    for p in contrast.parameters():
        p.grad = None
    output = contrast(features, labels[own], torch.randn(4, NUM_CLASSES, 8, 8)[own])
    sum(output.losses.values()).backward()
    return {
        "losses": {name: loss.detach() for name, loss in output.losses.items()},
        "parameters": [p.grad for p in contrast.parameters()],
        "features": {name: x.grad for name, x in features.items()},
        "buffers": {n.removeprefix("module."): b.clone() for n, b in contrast.named_buffers()},
    }


def run_rank() -> tuple[list[dict], dict[str, Tensor]]:
    """All cases in one pair of processes, since starting them takes the longest."""
    rank, results = dist.get_rank(), []
    for kind, sizes, blank in CASES:
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        contrast = DistributedDataParallel(build(kind))
        for step in (1, 2):  # the second step has anchors to contrast with
            result = run(contrast, own, blank, step)
        results.append(result)
    # Each process with anchors of its own. Buffers are not broadcast: they are equal by themselves.
    contrast = build(ContextrastPlus, across_processes=False)
    for step in (1, 2, 3):
        run(contrast, slice(2 * rank, 2 * rank + 2), [], step)
    return results, dict(contrast.memory.named_buffers())


@pytest.fixture(scope="module")
def ranks() -> list[tuple[list[dict], dict[str, Tensor]]]:
    return run_processes(run_rank, 2)


def test_losses_and_gradients_are_those_of_one_process(ranks: list) -> None:
    exact = {"rtol": 1e-9, "atol": 1e-13}
    for number, (kind, _, blank) in enumerate(CASES):
        contrast = build(kind)
        for step in (1, 2):
            one = run(contrast, slice(None), blank, step)
        two = [results[number] for results, _ in ranks]
        for name, loss in one["losses"].items():
            # The trainer logs the mean over the processes.
            torch.testing.assert_close(sum(rank["losses"][name] for rank in two) / 2, loss, **exact)
            assert (loss > 0) == (len(blank) < 4), (number, name)
        for rank in two:
            torch.testing.assert_close(rank["parameters"], one["parameters"], **exact)
            torch.testing.assert_close(rank["buffers"], one["buffers"], **exact)
        for name, gradient in one["features"].items():
            # DistributedDataParallel averages the parameters' gradients, not those of its inputs.
            both = torch.cat([rank["features"][name] for rank in two]) / 2
            torch.testing.assert_close(both, gradient, **exact)


def test_processes_with_anchors_of_their_own_share_a_memory(ranks: list) -> None:
    (_, first), (_, second) = ranks
    for name, buffer in first.items():
        assert buffer.equal(second[name]), name
    # What each half of the batch stores by itself, in the order of ranks.
    halves = [build(ContextrastPlus, across_processes=False) for _ in range(2)]
    expected = AnchorMemory(NUM_CLASSES, 6, 4).double()
    for step in (1, 2, 3):
        for rank, half in enumerate(halves):
            before = half.memory.pointers.clone()
            run(half, slice(2 * rank, 2 * rank + 2), [], step)
            keys = half.memory.keys.view(NUM_CLASSES, 4, 6)[torch.arange(NUM_CLASSES), before]
            stored = half.memory.pointers != before
            expected.push(keys, torch.arange(NUM_CLASSES).where(stored, torch.tensor(-1)))
    assert expected.filled.tolist() == [4, 4, 4, 4, 3]
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(first[name], buffer)
