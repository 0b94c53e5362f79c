"""The heads that make embeddings of feature maps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2.contrast import MultiScaleProjector, Projector

CHUNK = "contrast_d2.contrast.projector._CHUNK_ELEMENTS"


def test_number_of_parameters_for_hrnet_w48() -> None:
    channels = {"p1": 48, "p2": 96, "p3": 192, "p4": 384}
    released = MultiScaleProjector(channels, 256, num_hidden=1)
    # Per map: C^2 (convolution without bias) + 2 C (norm) + 256 C + 256.
    assert sum(p.numel() for p in released.parameters()) == 382_624
    paper = MultiScaleProjector(channels, 256, num_hidden=2)
    assert sum(p.numel() for p in paper.parameters()) == 382_624 + sum(
        c * c + 2 * c for c in channels.values()
    )


def test_order_is_convolution_relu_norm() -> None:
    projector = Projector(6, 4, num_hidden=2, bn_momentum=3e-4)
    kinds = [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]
    assert [type(layer) for layer in projector] == [*kinds, *kinds, nn.Conv2d]
    assert [projector[0].bias, projector[3].bias] == [None, None]
    assert projector[6].bias is not None
    assert [projector[2].momentum, projector[5].momentum] == [3e-4, 3e-4]
    features = torch.randn(2, 6, 3, 5)
    hidden = features
    for block in (0, 3):
        hidden = F.conv2d(hidden, projector[block].weight).relu()
        mean, var = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), unbiased=False)
        hidden = (hidden - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    expected = F.conv2d(hidden, projector[6].weight, projector[6].bias)
    torch.testing.assert_close(projector(features), expected, rtol=1e-4, atol=1e-5)


def test_norm_before_relu() -> None:
    projector = Projector(6, 4, num_hidden=1, order="norm_relu")
    assert [type(x) for x in projector] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]


def test_without_norm_the_hidden_convolutions_have_a_bias() -> None:
    projector = Projector(6, 4, num_hidden=1, norm=None)
    assert [type(layer) for layer in projector] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert projector[0].bias is not None
    assert not projector.has_batch_norm


@pytest.mark.parametrize(("bound", "width"), [(None, 6), (8, 6), (3, 3)])
def test_hidden_width_is_bounded(bound: int | None, width: int) -> None:
    projector = MultiScaleProjector({"res2": 6}, 4, max_hidden_channels=bound).heads["res2"]
    shapes = [tuple(x.weight.shape[:2]) for x in projector if isinstance(x, nn.Conv2d)]
    assert shapes == [(width, 6), (width, width), (4, width)]
    assert projector(torch.randn(2, 6, 3, 5)).shape == (2, 4, 3, 5)


@pytest.mark.parametrize("options", [{"order": "norm_relu", "norm": "layer"}, {"norm": None}])
def test_all_forms_project_rows_as_maps(options: dict) -> None:
    projector = Projector(6, 4, max_hidden_channels=5, **options)
    features = torch.randn(1, 6, 3, 5)
    rows = features.flatten(2)[0].T
    expected = projector(features).flatten(2)[0].T
    torch.testing.assert_close(
        projector.project_rows(rows, torch.ones(len(rows), dtype=torch.bool)), expected
    )


def test_each_map_has_its_own_head() -> None:
    projector = MultiScaleProjector({"res2": 4, "res3": 4}, 3, num_hidden=0)
    features = {"res3": torch.randn(2, 4, 3, 3), "stem": torch.randn(2, 9, 6, 6)}
    features["res2"] = features["res3"]
    out = projector(features)
    assert list(out) == ["res2", "res3"]
    for name, embedding in out.items():
        torch.testing.assert_close(embedding, projector.heads[name](features[name]))
    assert not torch.equal(out["res2"], out["res3"])


def test_a_missing_map_is_named() -> None:
    projector = MultiScaleProjector({"res2": 4, "res6": 4}, 3)
    features = {"res2": torch.randn(2, 4, 3, 3), "res5": torch.randn(2, 4, 3, 3)}
    with pytest.raises(ValueError, match=r"\['res6'\] are not among.*\['res2', 'res5'\]"):
        projector(features)


def test_keep_drops_the_other_heads() -> None:
    projector = MultiScaleProjector({"res2": 4, "res3": 4, "res4": 4}, 3)
    with pytest.raises(ValueError, match="no projector for feature map 'rse3'.*mean 'res3'"):
        projector.keep(["res2", "rse3"])
    assert set(projector.heads) == {"res2", "res3", "res4"}
    projector.keep(["res4", "res2"])
    assert set(projector.heads) == {"res2", "res4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels=0"),
        ({"embed_dim": 0}, "embed_dim=0"),
        ({"num_hidden": -1}, "num_hidden=-1"),
        ({"norm": "group"}, "norm='group'.*'batch', 'layer' or None"),
        ({"order": "norm"}, "order='norm'.*'relu_norm' or 'norm_relu'"),
        ({"max_hidden_channels": 0}, "max_hidden_channels=0"),
    ],
)
def test_wrong_sizes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Projector(**{"in_channels": 4, **arguments})


def test_a_projector_needs_a_map() -> None:
    with pytest.raises(ValueError, match="at least one feature map"):
        MultiScaleProjector({})


# ---- layer norms


def test_layer_norms_run_over_the_channels_of_each_pixel() -> None:
    projector = Projector(6, 4, num_hidden=1, norm="layer")
    with torch.no_grad():
        projector[2].weight.uniform_(0.5, 2), projector[2].bias.normal_()
    features = torch.randn(2, 6, 3, 5)
    hidden = F.conv2d(features, projector[0].weight).relu()
    mean, var = hidden.mean(1, keepdim=True), hidden.var(1, unbiased=False, keepdim=True)
    scale, shift = projector[2].weight[:, None, None], projector[2].bias[:, None, None]
    hidden = (hidden - mean) / (var + 1e-5).sqrt() * scale + shift
    expected = F.conv2d(hidden, projector[3].weight, projector[3].bias)
    torch.testing.assert_close(projector(features), expected, rtol=1e-4, atol=1e-5)


def test_names_of_parameters_do_not_depend_on_the_norm() -> None:
    names = [
        [name for name, _ in Projector(6, 4, norm=norm).named_parameters()]
        for norm in ("batch", "layer")
    ]
    assert names[0] == names[1]
    assert Projector(6, 4).has_batch_norm and not Projector(6, 4, norm="layer").has_batch_norm
    assert not Projector(6, 4, num_hidden=0).has_batch_norm


# ---- rows


def trained(num_hidden: int = 2, norm: str = "batch") -> Projector:
    """In fp64, with norms that scale and shift."""
    projector = Projector(6, 4, num_hidden=num_hidden, norm=norm).double()
    with torch.no_grad():
        for layer in projector:
            if not isinstance(layer, (nn.Conv2d, nn.ReLU)):
                layer.weight.uniform_(0.5, 2), layer.bias.normal_()
        for name, buffer in projector.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
    return projector


def random_map(*shape: int) -> Tensor:
    """Of channels with different scales, as ReLU leaves them."""
    scales = torch.logspace(-1, 1, shape[1], dtype=torch.float64)
    return torch.randn(shape, dtype=torch.float64).relu() * scales[:, None, None]


def as_rows(maps: Tensor) -> Tensor:
    return maps.movedim(1, -1).flatten(0, 2)


def everything(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


@pytest.mark.parametrize(
    ("num_hidden", "norm"), [(2, "batch"), (1, "batch"), (0, "batch"), (2, "layer")]
)
def test_rows_of_all_pixels_are_the_map(num_hidden: int, norm: str) -> None:
    dense = trained(num_hidden, norm)
    sampled = copy.deepcopy(dense)
    features = random_map(2, 6, 4, 5)
    weight = torch.randn(40, 4, dtype=torch.float64)
    results = []
    for projector, project in (
        (dense, lambda x: as_rows(dense(x))),
        (sampled, lambda x: sampled.project_rows(as_rows(x), everything(as_rows(x)))),
    ):
        x = features.clone().requires_grad_()
        embeddings = project(x)
        (embeddings * weight).sum().backward()
        gradients = [p.grad for p in projector.parameters()]
        results.append([embeddings, x.grad, *gradients, *projector.buffers()])
    # With the buffers: the running statistics and the number of batches.
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_rows_with_the_statistics_of_the_map_are_pixels_of_the_map() -> None:
    dense = trained()
    sampled = copy.deepcopy(dense)
    features = random_map(2, 6, 4, 5)
    chosen = torch.tensor([3, 17, 39, 5])
    statistics = sampled.map_statistics(features)
    rows = sampled.project_rows(as_rows(features)[chosen], everything(chosen), statistics)
    torch.testing.assert_close(rows, as_rows(dense(features))[chosen], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dict(sampled.named_buffers()), dict(dense.named_buffers()))


def test_statistics_of_the_map_are_constants() -> None:
    projector = trained(num_hidden=1)
    features = random_map(2, 6, 4, 5).requires_grad_()
    statistics = projector.map_statistics(features)
    assert not any(value.requires_grad for found in statistics for value in found)
    rows = as_rows(features)[[3]]
    embeddings = projector.project_rows(rows, everything(rows), statistics)
    (gradient,) = torch.autograd.grad(embeddings.sum(), features, retain_graph=True)
    gradient = as_rows(gradient)
    assert gradient[3].any() and not gradient[:3].any() and not gradient[4:].any()
    mean, var, _ = statistics[0]
    hidden = (rows @ projector[0].weight[:, :, 0, 0].T).relu()
    hidden = (hidden - mean) / (var + 1e-5).sqrt() * projector[2].weight + projector[2].bias
    expected = F.linear(hidden, projector[3].weight[:, :, 0, 0], projector[3].bias)
    torch.testing.assert_close(embeddings, expected)
    torch.testing.assert_close(
        torch.autograd.grad(embeddings.sum(), projector[0].weight)[0],
        torch.autograd.grad(expected.sum(), projector[0].weight)[0],
    )


# ---- statistics of the map


@pytest.mark.parametrize("chunk", [1, 40, 125, 300, 10**6])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_chunks_do_not_change_the_statistics(monkeypatch, chunk: int, memory_format) -> None:
    # One row, one row, several rows, several images with a rest, and everything at a time.
    monkeypatch.setattr(CHUNK, chunk)
    head = trained()
    features = random_map(5, 6, 4, 5).contiguous(memory_format=memory_format)
    inputs: list[Tensor] = []
    for layer in (head[2], head[5]):
        layer.register_forward_hook(lambda layer, args, output: inputs.append(args[0]))
    found = head.map_statistics(features)
    assert not inputs
    head(features)
    for statistics, hidden in zip(found, inputs, strict=True):
        assert statistics.count == 100
        torch.testing.assert_close(statistics.mean, hidden.mean((0, 2, 3)))
        torch.testing.assert_close(statistics.var, hidden.var((0, 2, 3), unbiased=False))


def test_statistics_hold_a_chunk_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(CHUNK, 1024)
    head = Projector(8, 4)
    features = torch.randn(4, 8, 16, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        head.map_statistics(features)
    allocated = [e.nbytes() for e in profile.profiler.kineto_results.events()]
    assert 1024 * 4 <= max(allocated) < 2 * 1024 * 4 < features.nbytes


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_in_fp32_do_not_cancel(monkeypatch, offset: float) -> None:
    monkeypatch.setattr(CHUNK, 2048)
    head = Projector(8, 4, num_hidden=1)
    nn.init.eye_(head[0].weight[:, :, 0, 0])
    features = torch.rand(2, 8, 32, 32) + offset
    (found,) = head.map_statistics(features)
    exact = as_rows(features.double()).var(0, unbiased=False)
    torch.testing.assert_close(found.var.double(), exact, rtol=1e-3, atol=0)
    head.project_rows(as_rows(features), everything(as_rows(features)))
    moved = (head[2].running_var.double() - 0.9) / 0.1 * (2047 / 2048)
    torch.testing.assert_close(moved, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_learn_under_autocast(dtype: torch.dtype) -> None:
    # autocast keeps cast copies of weights; one that was made without a graph must not be used.
    head = trained().float()
    features = random_map(2, 6, 4, 5).float()
    rows = as_rows(features)[::7]
    reference = torch.autograd.grad(
        head.project_rows(rows, everything(rows), head.map_statistics(features)).sum(),
        list(head.parameters()),
    )
    with torch.autocast("cpu", dtype=dtype):
        statistics = head.map_statistics(features)
        assert {value.dtype for found in statistics for value in found} == {torch.float32}
        embeddings = head.project_rows(rows, everything(rows), statistics)
        dense = head(features)
    assert embeddings.dtype == dense.dtype == dtype
    torch.testing.assert_close(embeddings, as_rows(dense)[::7], rtol=0.05, atol=0.1)
    gradients = torch.autograd.grad(embeddings.sum(), list(head.parameters()))
    for found, expected in zip(gradients, reference, strict=True):
        # Where bf16 carries a value over the kink of a ReLU, gradients turn, at times to 0.9.
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.6


# ---- few rows


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("num_rows", "num_valid"), [(0, 0), (1, 1), (3, 0), (3, 1)])
def test_no_row_and_a_single_one(norm: str, num_rows: int, num_valid: int) -> None:
    head = trained(norm=norm)
    before = copy.deepcopy(dict(head.named_buffers()))
    rows = torch.rand(num_rows, 6, dtype=torch.float64, requires_grad=True)
    embeddings = head.project_rows(rows, torch.arange(num_rows) < num_valid)
    assert embeddings.shape == (num_rows, 4) and embeddings.isfinite().all()
    embeddings.sum().backward()
    gradients = [rows.grad, *(p.grad for p in head.parameters())]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert head[6].bias.grad.tolist() == [num_rows] * 4
    if norm == "batch":
        after = dict(head.named_buffers())
        assert after["2.num_batches_tracked"] == num_valid
        hidden = (rows[:num_valid].detach() @ head[0].weight.detach()[:, :, 0, 0].T).relu()
        moved = 0.1 * num_valid
        torch.testing.assert_close(
            after["2.running_mean"], (1 - moved) * before["2.running_mean"] + 0.1 * hidden.sum(0)
        )
        # torch divides by the count less one; one pixel has no variance to divide.
        torch.testing.assert_close(after["2.running_var"], (1 - moved) * before["2.running_var"])


def test_padding_does_not_enter_the_statistics() -> None:
    head = trained()
    other = copy.deepcopy(head)
    rows = torch.rand(9, 6, dtype=torch.float64)
    valid = torch.tensor([1, 0, 1, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
    padded = rows.clone()
    padded[~valid] = 100
    expected = head.project_rows(rows[valid], everything(rows[valid]))
    torch.testing.assert_close(other.project_rows(padded, valid)[valid], expected)
    torch.testing.assert_close(dict(other.named_buffers()), dict(head.named_buffers()))


def test_evaluation_uses_the_running_statistics() -> None:
    head = trained()
    features = random_map(2, 6, 4, 5)
    head(features)
    head.eval()
    buffers = copy.deepcopy(dict(head.named_buffers()))
    rows = as_rows(features)
    for statistics in (None, head.map_statistics(features)):
        found = head.project_rows(rows, everything(rows), statistics)
        torch.testing.assert_close(found, as_rows(head(features)))
    torch.testing.assert_close(dict(head.named_buffers()), buffers, rtol=0, atol=0)
