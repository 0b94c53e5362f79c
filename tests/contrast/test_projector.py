"""The heads that make embeddings of feature maps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2.contrast import MultiScaleProjector, PixelDraw, Projector

FORMS = [
    {"num_hidden": 2, "norm": "batch"},
    {"num_hidden": 1, "norm": "batch", "order": "norm_relu"},
    {"num_hidden": 2, "norm": "layer"},
    {"num_hidden": 1, "norm": "layer", "order": "norm_relu"},
    {"num_hidden": 2, "norm": None},
    {"num_hidden": 0},
]


def build(**options) -> Projector:
    """In fp64, with norms that scale and shift."""
    projector = Projector(6, 4, **options).double()
    with torch.no_grad():
        for layer in projector:
            if isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm)):
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


# ---- layers


def test_number_of_parameters_for_hrnet_w48() -> None:
    channels = {"p1": 48, "p2": 96, "p3": 192, "p4": 384}
    projector = MultiScaleProjector(channels, 256, num_hidden=1)
    # Per map: C^2 (convolution without bias) + 2 C (norm) + 256 C + 256.
    assert sum(p.numel() for p in projector.parameters()) == 382_624


def test_layers_in_their_order() -> None:
    features = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    for options in FORMS:
        norm, order = options.get("norm"), options.get("order", "relu_norm")
        projector = build(bn_momentum=3e-4, **options)
        hidden, layers = features, iter(projector)
        for _ in range(options["num_hidden"]):
            convolution = next(layers)
            assert (convolution.bias is None) == (norm is not None)
            hidden = F.conv2d(hidden, convolution.weight, convolution.bias)
            relu_and_norm = [next(layers) for _ in range(1 if norm is None else 2)]
            if order == "relu_norm":
                hidden = hidden.relu()
            for layer in relu_and_norm:
                if norm is None or isinstance(layer, nn.ReLU):
                    continue
                over = (0, 2, 3) if norm == "batch" else (1,)
                assert norm == "layer" or layer.momentum == 3e-4
                var, mean = torch.var_mean(hidden, over, correction=0, keepdim=True)
                scale, shift = layer.weight[:, None, None], layer.bias[:, None, None]
                hidden = (hidden - mean) / (var + 1e-5).sqrt() * scale + shift
            if order == "norm_relu":
                hidden = hidden.relu()
        last = next(layers)
        expected = F.conv2d(hidden, last.weight, last.bias)
        torch.testing.assert_close(projector(features), expected)


def test_names_of_parameters_do_not_depend_on_the_norm() -> None:
    names = [[name for name, _ in build(**FORMS[i]).named_parameters()] for i in (0, 2)]
    assert names[0] == names[1]


# ---- heads of several maps


def test_each_map_has_its_own_head() -> None:
    projector = MultiScaleProjector({"res2": 4, "res3": 4}, 3, num_hidden=0)
    features = {"res3": torch.randn(2, 4, 3, 3), "stem": torch.randn(2, 9, 6, 6)}
    features["res2"] = features["res3"]
    done: dict[nn.Module, Tensor] = {}
    out = projector(features, done)
    assert list(out) == ["res2", "res3"]
    for name, embedding in out.items():
        torch.testing.assert_close(embedding, projector.heads[name](features[name]))
    assert not torch.equal(out["res2"], out["res3"])
    # What heads have projected in the step is not projected again.
    again = projector(features, done)
    assert all(again[name] is embedding for name, embedding in out.items())


def test_a_missing_map_is_named() -> None:
    projector = MultiScaleProjector({"res2": 4, "res6": 4}, 3)
    features = {"res2": torch.randn(2, 4, 3, 3), "res5": torch.randn(2, 4, 3, 3)}
    with pytest.raises(ValueError, match=r"'res6'.*\['res2', 'res5'\]"):
        projector(features)


def test_keep_drops_the_other_heads() -> None:
    projector = MultiScaleProjector({"res2": 4, "res3": 4, "res4": 4}, 3)
    with pytest.raises(ValueError, match="'rse3'.*'res3'"):
        projector.keep(["res2", "rse3"])
    assert set(projector.heads) == {"res2", "res3", "res4"}
    projector.keep(["res4", "res2"])
    assert set(projector.heads) == {"res2", "res4"}


def test_wrong_arguments_are_named() -> None:
    for arguments, message in (
        ({"in_channels": 0}, "in_channels=0"),
        ({"embed_dim": 0}, "embed_dim=0"),
        ({"num_hidden": -1}, "num_hidden=-1"),
        ({"norm": "group"}, "norm='group'.*'batch', 'layer' or None"),
        ({"order": "norm"}, "order='norm'.*'relu_norm'.*'norm_relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            Projector(**{"in_channels": 4, **arguments})
    with pytest.raises(ValueError, match="in_channels={}"):
        MultiScaleProjector({})
    with pytest.raises(ValueError, match="'neck.p2'"):
        MultiScaleProjector({"neck.p2": 4})
    with pytest.raises(ValueError, match="projection='pooled'.*'dense'.*'sampled'"):
        MultiScaleProjector({"res2": 4}, projection="pooled")


# ---- sampled projection


def test_rows_of_all_pixels_are_the_map() -> None:
    for options in FORMS:
        dense = build(**options)
        sampled = copy.deepcopy(dense)
        features = random_map(2, 6, 4, 5)
        weight = torch.randn(40, 4, dtype=torch.float64)
        results = []
        for projector, project in (
            (dense, lambda x, head=dense: as_rows(head(x))),
            (sampled, lambda x, h=sampled: h.project_rows(as_rows(x), everything(as_rows(x)))),
        ):
            x = features.clone().requires_grad_()
            embeddings = project(x)
            (embeddings * weight).sum().backward()
            gradients = [p.grad for p in projector.parameters()]
            results.append([embeddings, x.grad, *gradients, *projector.buffers()])
        # With the buffers: the running statistics and the number of batches.
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_sampled_embeddings_are_those_of_the_dense_projection() -> None:
    image, pixel = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 19, 0, 19, 3])
    ordinary = PixelDraw(image, pixel, torch.tensor([0, 0, 1, 1, 1]), (2, 3))
    # A pixel that is in two draws has two gradients.
    first = PixelDraw(image[:2], pixel[:2], torch.tensor([0, 1]), None)
    second = PixelDraw(image[:1], pixel[:1], torch.tensor([-1]), None)
    weight = torch.randn(5, 4, dtype=torch.float64)
    for options in FORMS[2:]:  # without batch norms, to which other pixels matter
        dense = MultiScaleProjector({"res2": 6}, 4, **options).double()
        sampled = MultiScaleProjector({"res2": 6}, 4, projection="sampled", **options).double()
        sampled.load_state_dict(dense.state_dict())
        features = random_map(2, 6, 4, 5)
        for draws in ([ordinary], [first, second]):
            results = []
            for projector in (dense, sampled):
                x = features.clone().requires_grad_()
                rows = projector.embed(projector({"res2": x}), {"res2": draws})["res2"]
                torch.testing.assert_close(rows.norm(dim=1), torch.ones_like(rows[:, 0]))
                parameters = list(projector.parameters())
                loss = (rows * weight[: len(rows)]).sum()
                results.append([rows, *torch.autograd.grad(loss, [x, *parameters])])
            torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("num_rows", "num_valid"), [(0, 0), (1, 1), (3, 0), (3, 1)])
def test_no_row_and_a_single_one(norm: str, num_rows: int, num_valid: int) -> None:
    head = build(num_hidden=2, norm=norm)
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
    head = build()
    other = copy.deepcopy(head)
    rows = torch.rand(9, 6, dtype=torch.float64)
    valid = torch.tensor([1, 0, 1, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
    padded = rows.clone()
    padded[~valid] = 100
    expected = head.project_rows(rows[valid], everything(rows[valid]))
    torch.testing.assert_close(other.project_rows(padded, valid)[valid], expected)
    torch.testing.assert_close(dict(other.named_buffers()), dict(head.named_buffers()))


def test_evaluation_uses_the_running_statistics() -> None:
    head = build()
    features = random_map(2, 6, 4, 5)
    head(features)
    head.eval()
    buffers = copy.deepcopy(dict(head.named_buffers()))
    rows = as_rows(features)
    torch.testing.assert_close(head.project_rows(rows, everything(rows)), as_rows(head(features)))
    torch.testing.assert_close(dict(head.named_buffers()), buffers, rtol=0, atol=0)


def test_statistics_in_fp32_do_not_cancel() -> None:
    for offset in (0.0, 1000.0):
        head = Projector(8, 4, num_hidden=1)
        nn.init.eye_(head[0].weight[:, :, 0, 0])
        rows = torch.rand(2048, 8) + offset
        head.project_rows(rows, everything(rows))
        moved = (head[2].running_var.double() - 0.9) / 0.1
        torch.testing.assert_close(moved, rows.double().var(0), rtol=1e-3, atol=0)


def test_rows_learn_under_autocast() -> None:
    head = build().float()
    rows = as_rows(random_map(2, 6, 4, 5).float())
    weight, parameters = torch.randn(40, 4), list(head.parameters())
    exact = head.project_rows(rows, everything(rows))
    reference = torch.autograd.grad((exact * weight).sum(), parameters)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            embeddings = head.project_rows(rows, everything(rows))
            dense = head(rows.T.reshape(1, 6, 5, 8))
        assert embeddings.dtype == dense.dtype == dtype
        torch.testing.assert_close(embeddings, as_rows(dense), rtol=0.05, atol=0.1)
        gradients = torch.autograd.grad((embeddings * weight).sum(), parameters)
        for found, expected in zip(gradients, reference, strict=True):
            # Where bf16 carries a value over the kink of a ReLU, gradients turn, at times to 0.9.
            assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.6
