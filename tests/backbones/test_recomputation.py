"""Activation checkpointing: less memory, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from contrast_d2.backbones import TimmBackbone

from .rows import wake_residuals

NAMES = [
    "resnet18",
    "hrnet_w18_small",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "pvt_v2_b0",
    "mobilenetv3_small_100",
]


def pair(name: str, **arguments) -> tuple[TimmBackbone, TimmBackbone]:
    """A backbone without and with recomputation, of the same weights."""
    kept = TimmBackbone(name, **arguments)
    wake_residuals(kept)
    recomputed = TimmBackbone(name, **arguments, activation_checkpointing=True)
    recomputed.load_state_dict(kept.state_dict())
    return kept.train(), recomputed.train()


def step(backbone: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """Forward and backward; the maps, and the bytes that were kept between them."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    def keep_input(args: tuple) -> None:
        keep(args[0])

    # What a block runs on again is kept too, out of the hooks' sight.
    for block in backbone.modules():
        if "forward" in vars(block):
            block.register_forward_pre_hook(lambda _, args: keep_input(args))
    torch.manual_seed(3)  # of stochastic depth
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        found = backbone(images)
    for parameter in backbone.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    sum((x * x.detach().cos()).sum() for x in found.values()).backward()
    return found, sum(kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_step_with_less_memory(name: str) -> None:
    rates = {} if name.startswith("hrnet") else {"drop_path_rate": 0.3}
    kept, recomputed = pair(name, **rates)
    images = torch.randn(2, 3, 64, 64)
    (expected, much), (found, little) = step(kept, images), step(recomputed, images)
    assert little < 0.7 * much
    for feature, x in found.items():
        assert torch.equal(x, expected[feature])
    for (parameter_name, one), other in zip(
        recomputed.named_parameters(), kept.parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda m, n=parameter_name: f"{n} {m}")
    # Running statistics too: they have seen the batch once.
    buffers = dict(kept.named_buffers())
    for buffer_name, buffer in recomputed.named_buffers():
        assert torch.equal(buffer, buffers[buffer_name]), buffer_name


def test_blocks_behind_frozen_ones_get_their_gradient() -> None:
    kept, recomputed = pair("resnet18", freeze_at=3)
    images = torch.randn(2, 3, 64, 64)
    step(kept, images)
    step(recomputed, images)
    for one, other in zip(recomputed.parameters(), kept.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_a_copy_trains_its_own_weights() -> None:
    _, recomputed = pair("resnet18")
    other = copy.deepcopy(recomputed)
    step(other, torch.randn(2, 3, 64, 64))
    assert all(p.grad is None for p in recomputed.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_nothing_is_recomputed_in_evaluation() -> None:
    _, recomputed = pair("resnet18")
    recomputed.eval()
    calls: list[nn.Module] = []
    recomputed.model.layer1[0].conv1.register_forward_hook(lambda m, *_: calls.append(m))
    x = torch.randn(1, 3, 64, 64)
    recomputed(x)["res5"].sum().backward()
    assert len(calls) == 1
    recomputed.train()
    recomputed(torch.cat([x, x]))["res5"].sum().backward()
    assert len(calls) == 3


def test_norms_may_be_synchronised_afterwards() -> None:
    kept, recomputed = pair("mobilenetv3_small_100")
    converted = convert_sync_batchnorm(recomputed)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = kept.eval()(images), converted.eval()(images)
    # The activations that timm fuses with its norms are still there.
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.skipif(
    torch.__version__.startswith("2.5."), reason="torch 2.5 updates running statistics twice"
)
def test_a_compiled_step_is_the_same() -> None:
    kept, recomputed = pair("test_resnet")
    torch.compiler.reset()
    images = torch.randn(2, 3, 64, 64)
    expected, found = kept(images), torch.compile(recomputed, backend="aot_eager")(images)
    for maps in (expected, found):
        sum((x * x.detach().cos()).sum() for x in maps.values()).backward()
    torch.compiler.reset()
    torch.testing.assert_close(found, expected)
    for one, other in zip(recomputed.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(recomputed.buffers(), kept.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_network_without_blocks_says_so() -> None:
    with (
        pytest.raises(ValueError, match="vgg11 has no blocks in sequence"),
        torch.device("meta"),
    ):
        TimmBackbone("vgg11", activation_checkpointing=True)
