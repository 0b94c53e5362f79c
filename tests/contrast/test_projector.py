"""The heads that make embeddings of feature maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contrast_d2.contrast import MultiScaleProjector, Projector, gather_embeddings


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
    ],
)
def test_wrong_sizes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Projector(**{"in_channels": 4, **arguments})


def test_a_projector_needs_a_map() -> None:
    with pytest.raises(ValueError, match="at least one feature map"):
        MultiScaleProjector({})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drawn_embeddings_are_unit_vectors(dtype: torch.dtype) -> None:
    embeddings = (10 * torch.randn(2, 5, 3, 4)).to(dtype)
    image, pixel = torch.tensor([1, 0, 1]), torch.tensor([11, 4, 0])
    drawn = gather_embeddings(embeddings, image, pixel)
    assert drawn.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, (b, y, x) in zip(drawn, [(1, 2, 3), (0, 1, 0), (1, 0, 0)], strict=True):
        vector = embeddings[b, :, y, x].to(drawn.dtype)
        torch.testing.assert_close(row, vector / vector.norm())


def test_an_empty_draw_stays_connected() -> None:
    embeddings = torch.randn(2, 5, 3, 4, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.long)
    drawn = gather_embeddings(embeddings, nothing, nothing)
    assert drawn.shape == (0, 5)
    (gradient,) = torch.autograd.grad(drawn.sum(), embeddings)
    assert torch.equal(gradient, torch.zeros(2, 5, 3, 4))
