"""Two gloo processes under DistributedDataParallel against one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from contrast_d2.contrast import (
    BalancedSampler,
    BoundaryNegatives,
    HardAnchorSampler,
    MultiScaleContrast,
    MultiScaleProjector,
)

from ..helpers import run_processes
from .test_sampling import count_draw

CHANNELS = {"res2": 4, "res3": 5, "res4": 6}
SIZES = {"res2": 8, "res3": 4, "res4": 2}
SPLITS = {"even": [2, 2], "uneven": [1, 3]}
# Images that hold ignored pixels only.
BLANK = {"none": [], "first rank": [0, 1], "second rank": [2, 3], "all": [0, 1, 2, 3]}
OPTIONS = {
    "default": {},
    "counting empty anchors": {"count_empty_anchors": True},
    "symmetric": {"symmetric": True, "cross_temperature": 0.3},
    "detached": {"detach_contrast": True},
    # All wrong pixels, so that chance plays no part.
    "negatives": {"negatives": BoundaryNegatives(5, fraction=1.0, max_negatives=10**6)},
}
CASES = [
    ("even", "none", "default"),
    ("uneven", "none", "default"),
    ("uneven", "none", "counting empty anchors"),
    ("uneven", "none", "symmetric"),
    ("uneven", "none", "detached"),
    ("uneven", "none", "negatives"),
    ("even", "first rank", "default"),
    ("even", "first rank", "negatives"),
    ("even", "second rank", "counting empty anchors"),
    ("even", "second rank", "detached"),
    ("even", "all", "default"),
]
BUDGETS = [
    {"balance": "class", "max_anchors": 30},
    {"balance": "class", "floor": 7},
    {"balance": "image_class", "min_pixels": 3, "max_per_group": 9},
]


def build(options: str) -> MultiScaleContrast:
    torch.manual_seed(0)
    # Without hidden layers, whose norms would see other statistics; and with a floor at which
    # every pixel is drawn, so that chance plays no part.
    return MultiScaleContrast(
        MultiScaleProjector(CHANNELS, 6, num_hidden=0),
        BalancedSampler(5, max_anchors=10**6, floor=10**5, across_processes=True),
        scale_weights={"res2": 1.0, "res3": 0.7, "res4": 0.4},
        cross_scale=[("res2", "res4", 1.0), ("res2", "res3", 0.5)],
        across_processes=True,
        **OPTIONS[options],
    ).double()


def make_batch(blank: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features, class scores and labels."""
    torch.manual_seed(1)
    features = {
        name: torch.randn(4, c, SIZES[name], SIZES[name], dtype=torch.float64, requires_grad=True)
        for name, c in CHANNELS.items()
    }
    labels = torch.randint(0, 4, (4, 16, 16))
    labels[:, :4] = 255
    labels[0, 4, 0] = 4  # class 4: one anchor at two scales, whose positives only exist across them
    labels[BLANK[blank]] = 255
    return features, torch.randn(4, 5, 8, 8), labels


def own_images(split: str) -> slice:
    sizes, rank = SPLITS[split], dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def run(contrast: torch.nn.Module, features: dict, logits: Tensor, labels: Tensor) -> dict:
    output = contrast(features, logits, labels)
    sum(output.losses.values()).backward()
    return {
        "losses": {name: loss.detach() for name, loss in output.losses.items()},
        "parameters": [p.grad for p in contrast.parameters()],
        "features": {name: f.grad for name, f in features.items()},
    }


def run_rank() -> dict:
    """All cases in one pair of processes, since starting them takes the longest."""
    results = {}
    for split, blank, options in CASES:
        features, logits, labels = make_batch(blank)
        images = own_images(split)
        own = {name: f.detach()[images].clone().requires_grad_() for name, f in features.items()}
        contrast = DistributedDataParallel(build(options))
        results[split, blank, options] = run(contrast, own, logits[images], labels[images])
    _, _, labels = make_batch("none")
    for index, budgets in enumerate(BUDGETS):
        sampler = BalancedSampler(5, across_processes=True, **budgets)
        results[index] = [
            count_draw(draw)
            for draw in sampler(
                [labels[own_images("uneven")], labels[own_images("uneven")][:, ::2]]
            )
        ]
    images = own_images("uneven")
    results["shares"] = own_draws(labels[images], max_anchors=31)
    return results


def own_draws(labels: Tensor, max_anchors: int) -> dict[str, list]:
    """How many pixels samplers draw that balance the images of each process by themselves."""
    samplers = {
        "class": BalancedSampler(5, max_anchors=max_anchors, floor=99),
        "fixed size": BalancedSampler(5, max_anchors=max_anchors, floor=99, fixed_size=True),
        "image_class": BalancedSampler(5, balance="image_class", max_anchors=max_anchors, floor=99),
        "least": BalancedSampler(5, max_anchors=10, floor=99),
    }
    draws = {name: sampler([labels])[0] for name, sampler in samplers.items()}
    hard = HardAnchorSampler(5, max_anchors=max_anchors)
    draws["hard"] = hard([labels], [torch.zeros_like(labels)])[0]
    return {name: [len(draw.labels), count_draw(draw)] for name, draw in draws.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_processes(run_rank, 2)


@pytest.mark.parametrize("case", CASES, ids=" - ".join)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[dict], case: tuple) -> None:
    _, blank, options = case
    one = run(build(options), *make_batch(blank))
    two = [rank[case] for rank in ranks]
    exact = {"rtol": 1e-9, "atol": 1e-13}
    for name, loss in one["losses"].items():
        mean = (two[0]["losses"][name] + two[1]["losses"][name]) / 2
        torch.testing.assert_close(mean, loss, **exact)
        assert (loss > 0) == (blank != "all"), name
    # DistributedDataParallel has averaged these ...
    for gradient, first, second in zip(
        one["parameters"], two[0]["parameters"], two[1]["parameters"], strict=True
    ):
        torch.testing.assert_close(first, gradient, **exact)
        torch.testing.assert_close(second, gradient, **exact)
    # ... which takes back the factor 2 that the gradients of each process's images carry.
    for name, gradient in one["features"].items():
        both = torch.cat([two[0]["features"][name], two[1]["features"][name]])
        torch.testing.assert_close(both, 2 * gradient, **exact)


@pytest.mark.parametrize("index", range(len(BUDGETS)))
def test_draws_share_the_global_budget(ranks: list[dict], index: int) -> None:
    _, _, labels = make_batch("none")
    one = BalancedSampler(5, across_processes=True, **BUDGETS[index])([labels, labels[:, ::2]])
    first_image = SPLITS["uneven"][0]
    for draw, first, second in zip(one, ranks[0][index], ranks[1][index], strict=True):
        shifted = {(label, image + first_image): n for (label, image), n in second.items()}
        assert {**first, **shifted} == dict(count_draw(draw))


def test_a_budget_is_shared_by_the_processes(ranks: list[dict]) -> None:
    _, _, labels = make_batch("none")
    first_image = SPLITS["uneven"][0]
    for rank, images in enumerate([slice(first_image), slice(first_image, None)]):
        shares = ranks[rank]["shares"]
        assert shares == own_draws(labels[images], max_anchors=16)  # half of 31, rounded up
        assert shares["class"][0] in range(12, 17)
        assert shares["fixed size"][0] == 16
        assert shares["least"][0] >= 8  # two of each class that is there, not one
