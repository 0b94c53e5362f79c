"""What the settings of a training make of the config's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import NaiveSyncBatchNorm
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from contrast_d2.engine import build_model

CONFIGS = Path(__file__).parents[2] / "configs" / "camvid"
BACKBONES = ["test_resnet", "mobilenetv3_small_100", "swin_tiny_patch4_window7_224"]


def config(backbone: str, *overrides: str):
    cfg = LazyConfig.load(str(CONFIGS / "semfpn_r18_ms_cs_cpu.py"))
    small = ["model.sem_seg_head.fpn_channels=16", "model.sem_seg_head.conv_dims=32"]
    return LazyConfig.apply_overrides(
        cfg,
        [f"model.backbone.name={backbone}", "model.backbone.pretrained=False", *small, *overrides],
    )


def batch() -> list[dict[str, Tensor]]:
    image = torch.randint(0, 256, (3, 61, 90), dtype=torch.uint8)
    labels = torch.randint(0, 11, (8, 12)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    return [{"image": image, "sem_seg": labels[:61, :90]}] * 2


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_batch_norm_can_be_synchronised(backbone: str) -> None:
    cfg = config(backbone, "model.sem_seg_head.norm=BN")
    model = instantiate(cfg.model).eval()
    plain = {
        name: nn.init.uniform_(module.weight, 0.5, 1.5)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine
    }
    inputs = batch()
    with torch.no_grad():
        expected = model(inputs)[0]["sem_seg"]
        converted = convert_sync_batchnorm(model).eval()
        found = converted(inputs)[0]["sem_seg"]
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    for part in ("sem_seg_head.", "contrast.projector."):
        assert any(name.startswith(part) for name in plain)
    # The weights are the same ones, and activations that timm fuses with its norms are left.
    state = dict(converted.named_parameters())
    assert all(state[f"{name}.weight"] is weight for name, weight in plain.items())
    assert torch.equal(found, expected)


def test_detectron2s_own_synchronised_norm_is_converted_too() -> None:
    norm = convert_sync_batchnorm(nn.Sequential(NaiveSyncBatchNorm(4)))
    assert type(norm[0]) is nn.SyncBatchNorm


@pytest.mark.parametrize("backbone", BACKBONES)
def test_channels_last_changes_the_layout_and_not_the_results(backbone: str) -> None:
    seen: list[Tensor] = []
    results = []
    inputs = batch()
    for channels_last in (False, True):
        torch.manual_seed(0)
        # In fp64: the rounding of fp32 can carry an activation over the kink of a ReLU, where the
        # gradient jumps. The scores alone are rounded to fp32, to 6e-8.
        model = build_model(config(backbone, f"train.channels_last={channels_last}")).double()
        model.backbone.register_forward_hook(lambda *args: seen.append(args[2]["res2"]))
        torch.manual_seed(1)
        losses = model.train()(inputs)
        sum(losses.values()).backward()
        gradient = model.backbone.model.get_parameter(
            next(n for n, p in model.backbone.model.named_parameters() if p.ndim == 4)
        ).grad
        with torch.no_grad():
            scores = model.eval()(inputs)[0]["sem_seg"]
        results.append({**{k: v.detach() for k, v in losses.items()}, "g": gradient, "s": scores})
    weight = next(p for p in model.parameters() if p.ndim == 4 and p.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    if not backbone.startswith("swin"):  # whose maps are brought into the usual layout
        formats = [x.is_contiguous(memory_format=torch.channels_last) for x in seen]
        assert formats == [False, False, True, True]
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        difference = (results[1][name] - value).norm() / value.norm()
        assert difference < 1e-5, name
