"""Several methods as one. Shape letters: B images, K classes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from contrast_d2.contrast import (
    PNE,
    BalancedSampler,
    ContrastSum,
    MultiScaleContrast,
    MultiScaleProjector,
)

K = 3
CHANNELS = {"res2": 5, "res3": 6, "res5": 8}


def multi_scale(*scales: str, temperature: float = 0.1, **head) -> MultiScaleContrast:
    projector = MultiScaleProjector(CHANNELS, 6, **{"num_hidden": 1, **head})
    sampler = BalancedSampler(K, max_anchors=40, min_per_class=10)
    weights = dict.fromkeys(scales, 1.0)
    return MultiScaleContrast(projector, sampler, scale_weights=weights, temperature=temperature)


def pne(feature: str = "res2", **head) -> PNE:
    projector = MultiScaleProjector(CHANNELS, **{"embed_dim": 6, "num_hidden": 1, **head})
    return PNE(projector, K, feature=feature, max_hard=1.0)


def methods() -> dict[str, nn.Module]:
    """res2 is tapped by three of them, once by drawn pixels alone; res3 by two; res5 by one."""
    return {
        "ms": multi_scale("res2", "res3", "res5"),
        "pne": pne(),
        "cool": multi_scale("res3", temperature=0.5),
        "sampled": multi_scale("res2", projection="sampled"),
    }


def random_batch(size: int = 64) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    strides = {"res2": 4, "res3": 8, "res5": 32}
    features = {
        n: torch.randn(2, c, size // strides[n], size // strides[n]) for n, c in CHANNELS.items()
    }
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(4, (2, size // 8, size // 8))]
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return features, labels, torch.randn(2, K, size // 4, size // 4)


def run(contrast: nn.Module, batch: tuple, generator: torch.Generator | None = None):
    return contrast(*batch, generator=generator or torch.Generator().manual_seed(1))


def gradients(losses: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    module.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad for name, p in module.named_parameters(remove_duplicate=False)}


def test_losses_statistics_and_gradients_are_those_of_the_methods_in_turn() -> None:
    batch, weights = random_batch(), {"pne": 0.5, "sampled": 3.0}
    batch = {n: x.double() for n, x in batch[0].items()}, batch[1], batch[2].double()
    total = ContrastSum(methods(), weights).double()
    generator, losses, statistics, sums = torch.Generator().manual_seed(1), {}, {}, {}
    for name, method in copy.deepcopy(dict(total.methods)).items():
        output, weight = run(method, batch, generator), weights.get(name, 1.0)
        for key, loss in output.losses.items():
            losses[key.replace("contrast_", f"contrast_{name}_")] = weight * loss.detach()
        for key, value in output.statistics.items():
            if key != "contrast/ignored_share":
                statistics[key.replace("contrast/", f"contrast/{name}/")] = value
        # Heads of one map are one: their gradients add up.
        for key, gradient in gradients(output.losses, method).items():
            sums[key] = sums.get(key, 0) + weight * gradient
    actual_generator = torch.Generator().manual_seed(1)
    actual = run(total, batch, actual_generator)
    assert all(loss > 0 for loss in losses.values()) and len(losses) == 6
    torch.testing.assert_close(actual.losses, losses)
    assert torch.equal(actual_generator.get_state(), generator.get_state())
    found = dict(actual.statistics)
    assert found.pop("contrast/ignored_share") > 0
    torch.testing.assert_close(found, statistics, equal_nan=True)
    for key, gradient in gradients(actual.losses, total).items():
        torch.testing.assert_close(gradient, sums[key.split(".", 2)[2]], msg=key)


def test_shared_heads_exist_once_and_are_those_of_the_first_method() -> None:
    parts = methods()
    first = {name: parts["ms"].projector.heads[name] for name in CHANNELS}
    total = ContrastSum(parts)
    for other in (total, copy.deepcopy(total), nn.SyncBatchNorm.convert_sync_batchnorm(total)):
        heads = {name: m.projector.heads for name, m in other.methods.items()}
        assert heads["ms"]["res2"] is heads["pne"]["res2"] is heads["sampled"]["res2"]
        assert heads["ms"]["res3"] is heads["cool"]["res3"]
        own = sum(len(list(head.parameters())) for head in heads["ms"].values())
        assert len(list(other.parameters())) == own
        if other is total:
            assert all(heads["ms"][name] is first[name] for name in CHANNELS)


def test_a_map_is_projected_once_per_step() -> None:
    total, calls = ContrastSum(methods()), []
    for name, head in total.methods["ms"].projector.heads.items():
        head.register_forward_hook(lambda *_, name=name: calls.append(name))
    run(total, random_batch())
    assert sorted(calls) == sorted(CHANNELS)


def test_a_state_fits_the_sum_and_its_methods_alone() -> None:
    batch = random_batch()
    total, other = ContrastSum(methods()), ContrastSum(methods())
    run(total, batch)  # moves the running statistics
    other.load_state_dict(copy.deepcopy(total.state_dict()), strict=True)
    heads = other.methods["ms"].projector.heads, other.methods["pne"].projector.heads
    assert heads[0]["res2"] is heads[1]["res2"]
    assert run(other.eval(), batch).losses == run(total.eval(), batch).losses
    prefix, state = "methods.pne.", total.state_dict()
    pne().load_state_dict(
        {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    )


def test_wrong_methods_and_weights_are_named() -> None:
    for head in ({"embed_dim": 7}, {"num_hidden": 2}, {"norm": "layer"}, {"order": "norm_relu"}):
        with pytest.raises(ValueError, match="(?s)'ms' and 'pne' project 'res2'"):
            ContrastSum({"ms": multi_scale("res2"), "pne": pne(**head)})
    assert ContrastSum({"ms": multi_scale("res2"), "pne": pne("res3", embed_dim=7)})
    for weights, message in (
        ({"pnee": 1.0}, "pnee.*'pne'"),
        ({"pne": -1.0}, "pne.*-1.0"),
        ({"pne": 0.0}, "pne.*0.0"),
        ({"pne": math.nan}, "pne.*nan"),
        ({"pne": math.inf}, "pne.*inf"),
    ):
        with pytest.raises(ValueError, match=message):
            ContrastSum(methods(), weights)
    method, other, across = pne(), pne("res3"), pne("res3")
    other.num_classes, across.across_processes = 5, True
    for parts, message in (
        ({}, "methods="),
        ({"a/b": pne()}, "'a/b'"),
        ({"x": nn.Linear(1, 1)}, "'x': Linear"),
        ({"a": method, "b": method}, "'a' and 'b'"),
        ({"a": pne(), "b": other}, "num_classes.*5 in 'b'"),
        ({"a": pne(), "b": across}, "across_processes.*True in 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            ContrastSum(parts)
