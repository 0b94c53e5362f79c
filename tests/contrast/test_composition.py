"""Sums of contrast methods. Shape letters: B images, K classes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from contrast_d2.contrast import (
    PNE,
    BalancedSampler,
    ContrastMethod,
    ContrastSum,
    MultiScaleContrast,
    MultiScaleProjector,
)

CHANNELS = {"res2": 5, "res3": 6, "res5": 8}
STRIDES = {"res2": 4, "res3": 8, "res5": 32}
NUM_CLASSES = 4


def projector(width: int = 6, **arguments) -> MultiScaleProjector:
    return MultiScaleProjector(CHANNELS, width, **{"num_hidden": 1, **arguments})


def multi_scale(*names: str, head: dict | None = None, **arguments) -> MultiScaleContrast:
    return MultiScaleContrast(
        projector(**head or {}),
        BalancedSampler(NUM_CLASSES, max_anchors=40),
        scale_weights=dict.fromkeys(names, 1.0),
        **arguments,
    )


def pne(feature: str = "res2", head: dict | None = None, **arguments) -> PNE:
    return PNE(
        projector(**head or {}), NUM_CLASSES, feature=feature, **{"max_hard": 1.0, **arguments}
    )


def methods() -> dict[str, ContrastMethod]:
    """Three that tap res2, of which one with drawn pixels only, and two that tap res3."""
    sampled = {"projection": "sampled", "norm_statistics": "map"}
    return {
        "ms": multi_scale("res2", "res3", cross_scale=[("res2", "res5", 1.0)]),
        "pne": pne(samples_per_group=5),
        "cool": multi_scale("res3", temperature=0.5),
        "sampled": multi_scale("res2", **sampled),
    }


def random_batch(size: int = 64) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    features = {
        name: torch.randn(2, c, size // STRIDES[name], size // STRIDES[name])
        for name, c in CHANNELS.items()
    }
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(4, (2, size // 8, size // 8))]
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return features, torch.randn(2, NUM_CLASSES, size // 4, size // 4), labels


def run(contrast: nn.Module, batch: tuple, seed: int = 1):
    return contrast(*batch, torch.Generator().manual_seed(seed))


def gradients(losses: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    module.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad for name, p in module.named_parameters(remove_duplicate=False)}


def test_losses_and_statistics_are_those_of_the_methods_in_turn() -> None:
    batch, weights = random_batch(), {"pne": 0.5, "sampled": 3.0}
    total = ContrastSum(methods(), weights)
    alone = copy.deepcopy(dict(total.methods))
    generator = torch.Generator().manual_seed(1)
    outputs = {name: method(*batch, generator) for name, method in alone.items()}
    actual_generator = torch.Generator().manual_seed(1)
    actual = total(*batch, actual_generator)
    expected = {
        f"loss_contrast_{name}_{term.removeprefix('loss_contrast_')}": weights.get(name, 1) * loss
        for name, output in outputs.items()
        for term, loss in output.losses.items()
    }
    assert list(actual.losses) == [
        "loss_contrast_ms_res2",
        "loss_contrast_ms_res3",
        "loss_contrast_ms_res2_res5",
        "loss_contrast_pne_res2",
        "loss_contrast_cool_res3",
        "loss_contrast_sampled_res2",
    ]
    assert list(actual.losses) == list(expected)
    assert all(loss > 0 for loss in expected.values())
    torch.testing.assert_close(actual.losses, expected)
    assert torch.equal(actual_generator.get_state(), generator.get_state())
    statistics = {
        f"contrast/{name}/{key.removeprefix('contrast/')}": value
        for name, output in outputs.items()
        for key, value in output.statistics.items()
    }
    assert (
        "contrast/pne/res2/groups" in statistics and "contrast/ms/res2_res5/anchors" in statistics
    )
    torch.testing.assert_close(actual.statistics, statistics, equal_nan=True)


def test_the_gradient_of_a_shared_head_is_the_sum_over_methods() -> None:
    batch, weights = random_batch(), {"ms": 2.0, "cool": 0.5}
    total = ContrastSum(methods(), weights).double()
    batch = ({name: x.double() for name, x in batch[0].items()}, batch[1].double(), batch[2])
    found = gradients(run(total, batch).losses, total)
    expected: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for name, method in copy.deepcopy(dict(total.methods)).items():
        output = method(*batch, generator)
        for key, gradient in gradients(output.losses, method).items():
            term = weights.get(name, 1) * gradient
            expected[key] = expected[key] + term if key in expected else term
    for key, gradient in found.items():
        _, method, rest = key.split(".", 2)
        torch.testing.assert_close(gradient, expected[rest], msg=key)


def test_parameters_of_shared_heads_exist_once() -> None:
    total = ContrastSum(methods())
    heads = {name: m.projector.heads for name, m in total.methods.items()}
    assert heads["ms"]["res2"] is heads["pne"]["res2"] is heads["sampled"]["res2"]
    assert heads["ms"]["res3"] is heads["cool"]["res3"]
    own = {p for name in CHANNELS for p in heads["ms"][name].parameters()}
    assert set(total.parameters()) == own and len(list(total.parameters())) == len(own)
    apart = ContrastSum(methods(), share_projectors=False)
    # res2 three times, res3 twice, res5 once.
    res2, res3, res5 = (len(list(heads["ms"][name].parameters())) for name in CHANNELS)
    assert len(list(apart.parameters())) == 3 * res2 + 2 * res3 + res5


def test_the_heads_are_those_of_the_first_method() -> None:
    parts = methods()
    first, second = parts["ms"].projector.heads["res2"], parts["pne"].projector.heads["res2"]
    assert not torch.equal(first[0].weight, second[0].weight)
    ContrastSum(parts)
    assert parts["pne"].projector.heads["res2"] is first


@pytest.mark.parametrize(("share", "times"), [(True, 1), (False, 2)])
def test_a_map_is_projected_once_per_step(share: bool, times: int) -> None:
    total, calls = ContrastSum(methods(), share_projectors=share), []
    for method in ("ms", "pne", "cool"):
        for name, head in total.methods[method].projector.heads.items():
            if share and method != "ms":
                continue
            head.register_forward_hook(lambda *_, name=name: calls.append(name))
    run(total, random_batch())
    assert {name: calls.count(name) for name in CHANNELS} == {
        "res2": times,
        "res3": times,
        "res5": 1,
    }
    norm = total.methods["pne"].projector.heads["res2"][2]
    # The method with drawn pixels moves the running statistics of the head once more.
    assert norm.num_batches_tracked == (2 if share else 1)


def test_a_shared_head_has_the_running_statistics_of_one_projection() -> None:
    batch = random_batch()
    total = ContrastSum({"ms": multi_scale("res2"), "pne": pne()})
    alone = copy.deepcopy(total.methods["ms"])
    before = copy.deepcopy(dict(alone.named_buffers()))
    run(total, batch), run(alone, batch)
    found = dict(total.methods["ms"].named_buffers())
    torch.testing.assert_close(found, dict(alone.named_buffers()), rtol=0, atol=0)
    assert all(not torch.equal(found[name], before[name]) for name in before)


def test_without_sharing_each_method_trains_its_own_head() -> None:
    batch = random_batch()
    total = ContrastSum({"ms": multi_scale("res2"), "pne": pne()}, share_projectors=False)
    found = gradients({"x": run(total, batch).losses["loss_contrast_pne_res2"]}, total)
    assert all((g is not None and bool(g.any())) == ("pne" in name) for name, g in found.items())


def test_state_dict_round_trip() -> None:
    batch = random_batch()
    total, other = ContrastSum(methods()), ContrastSum(methods())
    run(total, batch)  # moves the running statistics
    before = run(other, batch).losses
    other.load_state_dict(copy.deepcopy(total.state_dict()), strict=True)
    heads = other.methods["ms"].projector.heads, other.methods["pne"].projector.heads
    assert heads[0]["res2"] is heads[1]["res2"]
    total.eval(), other.eval()
    expected = run(total, batch).losses
    assert run(other, batch).losses == expected != before
    # The parts of a sum fit their methods alone.
    alone = pne(samples_per_group=5)
    state = total.state_dict()
    prefix = "methods.pne."
    alone.load_state_dict(
        {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    )


def test_copies_and_conversions_keep_heads_shared() -> None:
    batch = random_batch()
    total = ContrastSum(methods())
    expected = run(copy.deepcopy(total), batch).losses
    copied = copy.deepcopy(total)
    assert run(copied, batch).losses == expected
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(total))
    for other in (copied, synchronised):
        heads = {name: m.projector.heads for name, m in other.methods.items()}
        assert heads["ms"]["res2"] is heads["pne"]["res2"] is heads["sampled"]["res2"]
        assert heads["ms"]["res2"] is not total.methods["ms"].projector.heads["res2"]
        assert len(list(other.parameters())) == len(list(total.parameters()))


def test_nothing_to_contrast_gives_zeros() -> None:
    features, logits, labels = random_batch()
    total = ContrastSum(methods())
    output = run(total, (features, logits, torch.full_like(labels, 255)))
    assert [loss.item() for loss in output.losses.values()] == [0] * 6
    found = gradients(output.losses, total)
    assert all(gradient is not None and not gradient.any() for gradient in found.values())


def test_a_compiled_step_breaks_its_graph_once() -> None:
    batch, total = random_batch(), ContrastSum(methods())
    expected = run(copy.deepcopy(total), batch).losses
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = run(torch.compile(total, backend="aot_eager"), batch).losses
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1
    # With all projections in it.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(losses, expected)
    found = gradients(losses, total)
    assert all(g is not None and g.isfinite().all() for g in found.values())


def test_missing_predictions_and_maps_are_named() -> None:
    features, logits, labels = random_batch()
    total = ContrastSum(methods())
    with pytest.raises(ValueError, match="needs logits"):
        total(features, None, labels)
    del features["res3"]
    with pytest.raises(ValueError, match=r"feature maps \['res3'\]"):
        total(features, logits, labels)


@pytest.mark.parametrize(
    "head",
    [
        {"width": 7},
        {"num_hidden": 2},
        {"norm": "layer"},
        {"order": "norm_relu"},
        {"max_hidden_channels": 3},
    ],
    ids=str,
)
def test_heads_that_differ_are_named(head: dict) -> None:
    parts = {"ms": multi_scale("res2"), "pne": pne(head=head)}
    with pytest.raises(
        ValueError, match="(?s)'ms' and 'pne' project 'res2'.*share_projectors=False"
    ):
        ContrastSum(parts)
    assert run(ContrastSum(parts, share_projectors=False), random_batch()).losses


def test_heads_of_different_maps_may_differ() -> None:
    assert ContrastSum({"ms": multi_scale("res2"), "pne": pne("res3", head={"width": 7})})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"pnee": 1.0}, r"weights of \['pnee'\].*\['ms', 'pne', 'cool', 'sampled'\]"),
        ({"pne": -1.0}, r"weights\['pne'\]=-1.0: must be above 0"),
        ({"pne": 0.0}, r"weights\['pne'\]=0.0.*Leave out"),
        ({"pne": math.nan}, r"weights\['pne'\]=nan"),
        ({"pne": math.inf}, r"weights\['pne'\]=inf"),
    ],
)
def test_wrong_weights_are_named(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastSum(methods(), weights)


def test_wrong_methods_are_named() -> None:
    with pytest.raises(ValueError, match="give a method"):
        ContrastSum({})
    with pytest.raises(ValueError, match="'a/b'.*letters, digits and underscores"):
        ContrastSum({"a/b": pne()})
    with pytest.raises(ValueError, match="'x': Linear.*expected a ContrastMethod"):
        ContrastSum({"x": nn.Linear(1, 1)})
    method = pne()
    with pytest.raises(ValueError, match="'a' and 'b' were built with one projector.*its own"):
        ContrastSum({"a": method, "b": method})
    one = projector()
    sampler = BalancedSampler(NUM_CLASSES, max_anchors=40)
    scale = MultiScaleContrast(one, sampler, scale_weights={"res2": 1.0})
    with pytest.raises(ValueError, match="'a' and 'b' were built with one projector"):
        ContrastSum({"a": scale, "b": PNE(one, NUM_CLASSES, feature="res2")})
