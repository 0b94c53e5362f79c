"""The model configs: what they build is as large as what the papers describe.

Shape letters: B images, C channels, K classes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from contrast_d2.backbones import joined_channels
from contrast_d2.segmentor import ContrastiveSegmentor

FOLDER = Path(__file__).parents[2] / "configs" / "common" / "models"
SWIN = "swin_{}_patch4_window7_224"
RESNET = ("backbone.name=resnet101", "backbone.norm_outputs=False", "backbone.drop_path_rate=null")
NO_AUX = "sem_seg_head.aux_feature=null"


def config(file: str, *overrides: str, num_classes: int = 19, key: str = "model") -> DictConfig:
    """A config of one model and of its data, without pretrained weights."""
    loaded = LazyConfig.load(str(FOLDER / f"{file}.py"))
    cfg = DictConfig(
        {
            "model": loaded[key],
            "dataset": {"num_classes": num_classes, "ignore_label": 255},
        },
        flags={"allow_objects": True},
    )
    cfg.model.backbone.pretrained = False
    return LazyConfig.apply_overrides(cfg, [f"model.{override}" for override in overrides])


def meta_model(cfg: DictConfig) -> ContrastiveSegmentor:
    with torch.device("meta"):
        return instantiate(cfg.model)


# Millions of parameters, with the auxiliary head where there is one. From Wang et al., TPAMI 2020
# (HRNetV2), Liu et al., ICCV 2021 (UPerNet on Swin and on ResNet-101 for ADE20K's 150 classes),
# Pissas et al., ECCV 2022 (OCR, and UPerNet without auxiliary head).
def test_parameters(subtests: pytest.Subtests) -> None:
    for file, key, overrides, num_classes, millions, tolerance in [
        ("fcn_hrnet", "model", (), 19, 65.9, 0.002),
        ("ocr", "model", (), 19, 70.4, 0.01),
        # Their auxiliary head has 3x3 convolutions.
        (
            "ocr",
            "model",
            ("sem_seg_head.region_channels=512", "sem_seg_head.region_kernel_size=3"),
            19,
            73.2,
            0.002,
        ),
        ("ocr", "ocr_resnet", (), 18, 38.9, 0.002),
        ("deeplabv3", "model", (NO_AUX,), 19, 58.0, 0.002),
        ("upernet", "model", (), 150, 60.0, 0.002),
        ("upernet", "model", (f"backbone.name={SWIN.format('small')}",), 150, 81.0, 0.005),
        ("upernet", "model", (f"backbone.name={SWIN.format('base')}",), 150, 121.0, 0.005),
        ("upernet", "model", (f"backbone.name={SWIN.format('large')}",), 150, 234.0, 0.002),
        ("upernet", "model", RESNET, 150, 86.0, 0.01),
        ("upernet", "model", (*RESNET, NO_AUX), 19, 83.0, 0.002),
    ]:
        with subtests.test(file=file, key=key, overrides=overrides):
            model = meta_model(config(file, *overrides, num_classes=num_classes, key=key))
            count = sum(p.numel() for p in model.parameters())
            assert count / 1e6 == pytest.approx(millions, rel=tolerance)


CHANNELS = "${model.sem_seg_head.channels}"
JOINED = L(joined_channels)(name="${model.backbone.name}", feature="concat")
# What a contrast method can tap of each, with its width as an experiment file would write it.
TAPS = {
    ("fcn_hrnet", "model"): JOINED,
    ("semfpn", "model"): {
        **{f"p{i}": "${model.sem_seg_head.fpn_channels}" for i in (2, 3, 4, 5)},
        "pre_logits": "${model.sem_seg_head.conv_dims}",
    },
    ("deeplabv3", "model"): {"pre_logits": CHANNELS},
    ("deeplabv3plus", "model"): {"pre_logits": CHANNELS},
    ("ocr", "model"): JOINED,
    ("ocr", "ocr_resnet"): {"pre_logits": CHANNELS},
    ("upernet", "model"): {f: CHANNELS for f in ("p2", "p3", "p4", "p5", "pre_logits")},
}
# Where logits stay at the stride of a dilated backbone.
STRIDE_8 = [("deeplabv3", "model"), ("ocr", "ocr_resnet")]
# A small backbone for each.
SMALL = {
    "fcn_hrnet": "hrnet_w18_small",
    "semfpn": "resnet18",
    "deeplabv3": "resnet18",
    "deeplabv3plus": "resnet18",
    "ocr": "hrnet_w18_small",
    "upernet": "resnet18",
}


def batch(num_classes: int) -> list[dict[str, Tensor]]:
    return [
        {
            "image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8),
            "sem_seg": torch.randint(0, num_classes, (64, 96)),
        }
        for _ in range(2)
    ]


@pytest.mark.parametrize(("file", "key"), TAPS)
def test_trains_and_infers(file: str, key: str) -> None:
    cfg = config(file, num_classes=4, key=key)
    cfg.model.backbone.name = "resnet18" if key == "ocr_resnet" else SMALL[file]
    if file == "upernet":
        cfg.model.backbone.update(norm_outputs=False, drop_path_rate=None)
    if "channels" in cfg.model.sem_seg_head:
        cfg.model.sem_seg_head.channels = 64
    model = instantiate(cfg.model).train()
    losses = model(batch(4))
    has_aux = file in ("deeplabv3", "ocr", "upernet")
    assert set(losses) == {"loss_sem_seg", *(["loss_aux"] if has_aux else [])}
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    model.eval()
    with torch.no_grad():
        results = model(batch(4))
    assert [tuple(x["sem_seg"].shape) for x in results] == [(4, 64, 96)] * 2


@pytest.mark.parametrize(("file", "key"), TAPS)
def test_what_contrast_methods_can_tap(file: str, key: str) -> None:
    cfg = config(file, key=key)
    cfg.in_channels = TAPS[file, key]
    model = meta_model(cfg)
    maps = {
        name: torch.zeros(2, s.channels, 64 // s.stride, 64 // s.stride, device="meta")
        for name, s in model.backbone.output_shape().items()
    }
    output = model.sem_seg_head.decode(maps)
    stride = 8 if (file, key) in STRIDE_8 else 4
    assert output.logits.shape[-2:] == (64 // stride, 64 // stride)
    features = output.features
    widths = dict(instantiate(cfg.in_channels))
    assert {name: features[name].shape[1] for name in widths} == widths
    assert not features.keys() & maps.keys()  # neither hides the other
    assert isinstance(model.sem_seg_head.predictor, nn.Conv2d)
