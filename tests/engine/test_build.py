"""What the settings of a training make of the config's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling import SemanticSegmentor
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from contrast_d2.backbones import TimmBackbone
from contrast_d2.engine import Trainer, build_evaluation, build_model, load_config

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


def test_amp_brings_channels_last_with_it(subtests: pytest.Subtests) -> None:
    """One override for both, and each by itself."""
    path = str(CONFIGS / "semfpn_r18_ms_cs_cpu.py")
    for overrides, expected in [
        ([], False),
        (["train.amp.enabled=True"], True),
        (["train.amp.enabled=True", "train.channels_last=False"], False),
        (["train.channels_last=True"], True),
    ]:
        with subtests.test(overrides=overrides):
            small = ["model.backbone.name=test_resnet", "model.backbone.pretrained=False"]
            cfg = load_config(path, [*small, "train.device=cpu", *overrides])
            assert cfg.train.amp.dtype == "bf16"
            weight = next(p for p in build_model(cfg).parameters() if p.ndim == 4)
            assert weight.is_contiguous(memory_format=torch.channels_last) == expected


def test_detectron2s_own_model_trains_on_our_samples(camvid: Path) -> None:
    cfg = config("test_resnet", "train.device=cpu")
    backbone = TimmBackbone("test_resnet")
    shape = backbone.output_shape()
    cfg.model = L(SemanticSegmentor)(
        backbone=L(TimmBackbone)(name="test_resnet"),
        sem_seg_head=L(SemSegFPNHead)(
            input_shape=L("builtins.dict")(
                **{n: L(ShapeSpec)(channels=s.channels, stride=s.stride) for n, s in shape.items()}
            ),
            num_classes=11,
            conv_dims=16,
            common_stride=4,
            ignore_value=255,
        ),
        pixel_mean=[120.0] * 3,
        pixel_std=[60.0] * 3,
    )
    cfg.dataloader.train.num_workers = 0
    cfg.dataloader.train.total_batch_size = 2
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    loader = instantiate(cfg.dataloader.train)
    assert next(iter(loader))[0]["sem_seg"].dtype == torch.uint8
    before = model.sem_seg_head.predictor.weight.detach().clone()
    trainer = Trainer(model, loader, optimizer, seed=0)
    trainer.train(0, 1)
    assert trainer.storage.latest()["loss_sem_seg"][0] > 0
    assert not torch.equal(model.sem_seg_head.predictor.weight, before)


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
def test_an_evaluation_has_the_precision_of_the_training(amp: str | None) -> None:
    options = [] if amp is None else ["train.amp.enabled=True", f"train.amp.dtype={amp}"]
    cfg = load_config("configs/shapes/semfpn_r18_ms_cs_demo.py", ["train.device=cpu", *options])
    cfg.dataloader.test.num_workers = 0
    cfg.dataloader.evaluator.output_dir = None
    dtypes: set[torch.dtype] = set()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 9, 1)

        def forward(self, batch: list[dict]) -> list[dict[str, Tensor]]:
            scores = self.layer(batch[0]["image"][None].float())
            dtypes.add(scores.dtype)
            return [{"sem_seg": scores[0].float()}]

    model = Net().train()
    scores = build_evaluation(cfg)(model)["sem_seg"]
    expected = {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert dtypes == {expected}
    assert 0 <= scores["mIoU"] <= 100 and model.training
