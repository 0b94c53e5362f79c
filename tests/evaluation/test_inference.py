"""Test protocols. Shape letters: K classes, H W an image, h w a window of it."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import inference_on_dataset
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2.backbones import TimmBackbone
from contrast_d2.decoders import FCNDecoder
from contrast_d2.engine import build_evaluation, load_config
from contrast_d2.evaluation import (
    InferenceProtocol,
    MultiScaleFlip,
    SemSegEvaluator,
    SlidingWindow,
)
from contrast_d2.evaluation.inference import resized_size
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.segmentor import ContrastiveSegmentor

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/shapes/semfpn_r18_ms_cs_demo.py")
PRESETS = LazyConfig.load(str(ROOT / "configs/common/inference.py"))
MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]


class Model(nn.Module):
    """Scores by a rule, resized as a model does; keeps what it was given.

    Args:
        rule: (3, H, W) image -> (K, H, W) scores.
    """

    def __init__(self, rule) -> None:
        super().__init__()
        self.rule = rule
        self.batches: list[list[dict[str, Any]]] = []
        self.eval()

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [tuple(x["image"].shape[-2:]) for batch in self.batches for x in batch]

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        self.batches.append(batched_inputs)
        outputs = []
        for x in batched_inputs:
            scores = self.rule(x["image"])
            size = x.get("height", scores.shape[-2]), x.get("width", scores.shape[-1])
            resized = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
            outputs.append({"sem_seg": resized})
        return outputs


def pixelwise(image: Tensor) -> Tensor:
    """Scores that are small integers, whose sums are exact, and know of no neighbour."""
    red, green, blue = image.float()
    return torch.stack([red, green - blue, 2 * blue, 100 - red])


def contextual(image: Tensor) -> Tensor:
    """Scores that depend on the whole window and on where in it a pixel is."""
    image = image.double()
    ramp = torch.linspace(-1, 1, image.shape[-1], dtype=torch.float64)
    return (image - image.mean(dim=(-2, -1), keepdim=True)) * ramp


def sample(*size: int, **more: Any) -> dict[str, Any]:
    return {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8), **more}


def segmentor() -> ContrastiveSegmentor:
    backbone = TimmBackbone("hrnet_w18_small")
    return ContrastiveSegmentor(
        backbone=backbone,
        sem_seg_head=FCNDecoder(backbone.output_shape(), num_classes=5),
        pixel_mean=MEAN,
        pixel_std=STD,
        seg_loss=SegLoss(CrossEntropyLoss()),
    ).eval()


def scores_of(model: nn.Module, *images: dict[str, Any]) -> list[Tensor]:
    return [output["sem_seg"] for output in model(list(images))]


# Windows


def test_windows_of_a_pixelwise_model_equal_the_whole_image(subtests: pytest.Subtests) -> None:
    for size, window, stride in [
        ((20, 31), (8, 12), (8, 12)),
        ((20, 31), (8, 12), (3, 5)),
        ((20, 31), 7, 7),
        ((20, 31), (20, 31), None),
        ((21, 30), (20, 12), (1, 7)),
        ((20, 31), 64, 64),
        ((5, 31), (8, 12), (3, 5)),
    ]:
        for pad_value in [None, MEAN]:
            with subtests.test(size=size, window=window, pad_value=pad_value):
                model = Model(pixelwise)
                sliding = SlidingWindow(model, window=window, stride=stride, pad_value=pad_value)
                x = sample(*size)
                (scores,) = scores_of(sliding, x)
                assert torch.equal(scores, pixelwise(x["image"]))
                limits = (window, window) if isinstance(window, int) else window
                wanted = limits if pad_value else tuple(map(min, size, limits))
                assert set(model.sizes) == {wanted}


def test_windows_lie_where_they_should():
    model = Model(pixelwise)
    image = torch.arange(11 * 14).view(1, 11, 14).expand(3, -1, -1)
    SlidingWindow(model, window=(4, 6), stride=(3, 4))([{"image": image}])
    corners = [int(x["image"][0, 0, 0]) for batch in model.batches for x in batch]
    assert corners == [14 * top + left for top in (0, 3, 6, 7) for left in (0, 4, 8)]
    model.batches.clear()
    SlidingWindow(model, window=(4, 6))([{"image": image}])  # not overlapping but for the last
    corners = [int(x["image"][0, 0, 0]) for batch in model.batches for x in batch]
    assert corners == [14 * top + left for top in (0, 4, 7) for left in (0, 6, 8)]


def test_overlaps_are_averaged(subtests: pytest.Subtests) -> None:
    for batch_size in [1, 4, 100]:
        for accumulate_on_cpu in [False, True]:
            with subtests.test(batch_size=batch_size, accumulate_on_cpu=accumulate_on_cpu):
                model = Model(contextual)
                x = sample(13, 17, file_name="a.png")
                sliding = SlidingWindow(
                    model,
                    window=(6, 8),
                    stride=(4, 5),
                    batch_size=batch_size,
                    accumulate_on_cpu=accumulate_on_cpu,
                )
                (scores,) = scores_of(sliding, x)
                total, count = torch.zeros(3, 13, 17, dtype=torch.float64), torch.zeros(13, 17)
                for top in (0, 4, 7):
                    for left in (0, 5, 9):
                        part = ..., slice(top, top + 6), slice(left, left + 8)
                        total[part] += contextual(x["image"][part])
                        count[part] += 1
                assert scores.dtype == torch.float32
                torch.testing.assert_close(scores.double(), total / count, rtol=1e-5, atol=1e-4)
                batches = {1: [1] * 9, 4: [4, 4, 1], 100: [9]}
                assert [len(batch) for batch in model.batches] == batches[batch_size]
                assert {view["file_name"] for batch in model.batches for view in batch} == {"a.png"}


def test_windows_of_several_images_at_their_output_sizes():
    model = Model(pixelwise)
    images = sample(9, 20, height=18, width=41), sample(15, 8)
    scores = scores_of(SlidingWindow(model, window=6, stride=4, batch_size=3), *images)
    assert [tuple(s.shape) for s in scores] == [(4, 18, 41), (4, 15, 8)]
    for result, whole in zip(scores, scores_of(model, *images), strict=True):
        assert torch.equal(result, whole)


def test_a_window_as_large_as_the_image_changes_nothing():
    model = segmentor()
    x = sample(50, 70, height=40, width=60)
    (expected,) = scores_of(model, x)
    with torch.no_grad():
        assert torch.equal(scores_of(SlidingWindow(model, window=(50, 70)), x)[0], expected)
    # The model pads to 64x96 with its mean, so filling up to that beforehand is no difference.
    (padded,) = scores_of(SlidingWindow(model, window=(64, 96), pad_value=MEAN), x)
    assert torch.equal(padded, expected)
    (grey,) = scores_of(SlidingWindow(model, window=(64, 96), pad_value=[0, 0, 0]), x)
    assert not torch.equal(grey, expected)


# Scales and mirror images


def by_height(scores: dict[int, list[float]]):
    """A rule whose scores depend on the height of the image alone."""

    def rule(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        return torch.tensor(scores[height])[:, None, None].expand(-1, height, width)

    return rule


@pytest.mark.parametrize("accumulate_on_cpu", [False, True])
def test_probabilities_of_scales_are_averaged(accumulate_on_cpu):
    logits = {5: [0.0, 2.0, -1.0], 10: [3.0, 0.0, 0.5], 18: [-2.0, 0.0, 6.0]}
    model = Model(by_height(logits))
    views = MultiScaleFlip(model, scales=[0.5, 1, 1.75], accumulate_on_cpu=accumulate_on_cpu)
    (scores,) = scores_of(views, sample(10, 6, height=20, width=13))
    assert model.sizes == [(5, 3), (10, 6), (18, 11)]
    by_view = torch.tensor([logits[h] for h in (5, 10, 18)], dtype=torch.float64).softmax(dim=1)
    expected = by_view.mean(dim=0)[:, None, None].expand(3, 20, 13)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-7)


def test_views_at_the_size_of_the_image_are_the_image():
    model = Model(pixelwise)
    x = sample(12, 10)
    (scores,) = scores_of(MultiScaleFlip(model, flip=True), x)
    (view,), (mirrored,) = model.batches
    assert view["image"].dtype == torch.uint8 and torch.equal(view["image"], x["image"])
    assert torch.equal(mirrored["image"], x["image"].flip(-1))
    # Scores of a model without a sense of left and right.
    assert torch.equal(scores, pixelwise(x["image"]).softmax(dim=0))


def test_the_mirror_image_is_mirrored_back():
    def rule(image: Tensor) -> Tensor:
        ramp = torch.arange(image.shape[-1]).expand(image.shape[-2:]) / 4
        return torch.stack([ramp, torch.zeros_like(ramp)]) + image[:2] / 100

    x = sample(6, 9)
    (scores,) = scores_of(MultiScaleFlip(Model(rule), flip=True), x)
    ramp = torch.arange(9, dtype=torch.float64).expand(6, 9) / 4
    difference = (x["image"][0].double() - x["image"][1]) / 100
    expected = (torch.sigmoid(difference + ramp) + torch.sigmoid(difference + ramp.flip(-1))) / 2
    torch.testing.assert_close(scores[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_several_images_are_run_together():
    model = Model(pixelwise)
    images = sample(8, 12), sample(6, 10, height=12, width=20)
    views = MultiScaleFlip(model, scales=[0.5, 2.0], flip=True)
    together = scores_of(views, *images)
    assert [len(batch) for batch in model.batches] == [2] * 4
    assert [tuple(s.shape) for s in together] == [(4, 8, 12), (4, 12, 20)]
    for result, x in zip(together, images, strict=True):
        assert torch.equal(result, scores_of(views, x)[0])


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_images_are_resized_as_in_training(factor):
    # A smooth image with one sharp edge, so that a shift by half a pixel or aliasing would show.
    column = torch.linspace(0, 200, 40).expand(30, 40).clone()
    column[:, 21:] = 255 - column[:, 21:]
    image = column.to(torch.uint8).expand(3, -1, -1)
    model = Model(pixelwise)
    MultiScaleFlip(model, scales=[factor])([{"image": image}])
    size = int(30 * factor), int(40 * factor)
    transform = T.ResizeTransform(30, 40, *size, Image.BILINEAR)
    expected = torch.from_numpy(transform.apply_image(image.permute(1, 2, 0).numpy()).copy())
    resized = model.batches[0][0]["image"].permute(1, 2, 0)
    assert (resized - expected.float()).abs().max() <= 1  # of 255; rounding


def test_sizes_of_resized_images(subtests: pytest.Subtests) -> None:
    for size, settings, expected in [
        ((375, 500), {"short_side": 512}, (512, 683)),
        ((500, 375), {"short_side": 512}, (683, 512)),
        ((375, 500), {"long_side": 520}, (390, 520)),
        ((375, 500), {"long_side": 520, "scale": 0.5}, (195, 260)),
        ((334, 500), {"long_side": 520, "scale": 1.25}, (434, 650)),
        ((300, 3000), {"short_side": 512, "long_side": 2048}, (205, 2048)),
        ((300, 600), {"short_side": 512, "long_side": 2048}, (512, 1024)),
        ((300, 600), {"short_side": 512, "long_side": 2048, "scale": 0.5}, (256, 512)),
        ((1024, 2048), {"scale": 0.75}, (768, 1536)),
        ((5, 7), {"scale": 0.5}, (3, 4)),
        ((5, 700), {"scale": 0.01}, (1, 7)),
        ((123, 457), {}, (123, 457)),
    ]:
        with subtests.test(size=size, settings=settings):
            assert resized_size(*size, **settings) == expected


def test_scales_and_windows_compose():
    model = segmentor()
    x = sample(60, 90)
    views = MultiScaleFlip(
        SlidingWindow(model, window=(48, 64), stride=(32, 32), batch_size=4),
        scales=[0.5, 1.0],
        flip=True,
    )
    (scores,) = scores_of(views, x)
    expected = torch.zeros(5, 60, 90)
    for size in ((30, 45), (60, 90)):
        image = x["image"].float()
        if size != (60, 90):
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        tops, lefts = ((0,), (0,)) if size == (30, 45) else ((0, 12), (0, 26))
        for view in (image, image.flip(-1)):
            total, count = torch.zeros(5, *size), torch.zeros(size)
            for top in tops:
                for left in lefts:
                    part = ..., slice(top, top + 48), slice(left, left + 64)
                    with torch.no_grad():
                        total[part] += model([{"image": view[part]}])[0]["sem_seg"]
                    count[part] += 1
            logits = F.interpolate((total / count)[None], (60, 90), mode="bilinear")[0]
            probabilities = logits.softmax(dim=0)
            expected += (probabilities if view is image else probabilities.flip(-1)) / 4
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert (scores.sum(dim=0) - 1).abs().max() < 1e-5
    assert not scores.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 9])
def test_sums_of_low_precision_scores_are_fp32(dtype, window):
    model = Model(lambda image: pixelwise(image).to(dtype) / 64)
    x = sample(16, 20)
    stride = None if window is None else 2
    protocol = InferenceProtocol(scales=[1.0, 1.5], flip=True, window=window, stride=stride)
    with torch.autocast("cpu", dtype=dtype):
        (scores,) = scores_of(protocol(model), x)
    (exact,) = scores_of(protocol(Model(lambda image: pixelwise(image) / 64)), x)
    assert scores.dtype == torch.float32
    # One rounding of scores up to 8 at the model's output, and none of the sums.
    assert (scores - exact).abs().max() < 8 * torch.finfo(dtype).eps


# What is kept, and where


def test_views_and_sums_are_on_the_device_of_the_model():
    model = Model(pixelwise)
    model.register_buffer("weight", torch.empty(1, device="meta"))
    protocol = InferenceProtocol(
        scales=[0.5, 1.5], flip=True, window=10, stride=7, pad_value=MEAN, batch_size=2
    )
    (scores,) = scores_of(protocol(model), sample(12, 16, height=24, width=32))
    assert (scores.device.type, tuple(scores.shape)) == ("meta", (4, 24, 32))
    assert {x["image"].device.type for batch in model.batches for x in batch} == {"meta"}


class Watched(Model):
    """Counts how many of its outputs are still alive."""

    def __init__(self) -> None:
        super().__init__(pixelwise)
        self.outputs: list[weakref.ref] = []
        self.most = 0

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        self.most = max(self.most, sum(ref() is not None for ref in self.outputs))
        outputs = super().forward(batched_inputs)
        self.batches.clear()
        self.outputs += [weakref.ref(output["sem_seg"]) for output in outputs]
        return outputs


def test_memory_does_not_grow_with_the_images(make_dataset):
    labels = [torch.randint(0, 4, (24, 32)).numpy() for _ in range(12)]
    name = make_dataset(labels, ("a", "b", "c", "d"))
    model = Watched()
    protocol = InferenceProtocol(scales=[0.5, 1.0, 1.5], flip=True, window=16, stride=8)
    loader = [[{**r, **sample(24, 32)}] for r in DatasetCatalog.get(name)]
    results = inference_on_dataset(protocol(model), loader, SemSegEvaluator(name))
    assert 0 < results["sem_seg"]["pACC"] < 100
    assert len(model.outputs) > 12 * 6
    assert model.most <= 2
    assert all(ref() is None for ref in model.outputs)


def test_modes_are_handed_on_and_restored():
    model = segmentor()
    for training in (True, False):
        model.train(training)
        wrapped = InferenceProtocol(scales=[1.0, 2.0], window=32)(model)
        assert (wrapped.training, wrapped.model.training) == (training, training)
        seen = []
        handle = model.register_forward_hook(lambda m, *_, seen=seen: seen.append(m.training))
        inference_on_dataset(wrapped, [[sample(32, 32)]], None)
        handle.remove()
        assert seen and not any(seen)
        assert model.training == model.backbone.training == training
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        InferenceProtocol(flip=True)(model.train())([sample(32, 32)])
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        InferenceProtocol(window=32)(model)([sample(32, 32)])


# Settings


def test_the_default_is_the_model_itself():
    model = segmentor()
    assert InferenceProtocol()(model) is model
    assert InferenceProtocol(pad_value=MEAN, accumulate_on_cpu=True)(model) is model
    assert instantiate(load_config(CONFIG).dataloader.inference)(model) is model
    for change in ({"scales": [0.5]}, {"flip": True}, {"short_side": 32}, {"long_side": 32}):
        assert isinstance(InferenceProtocol(**change)(model), MultiScaleFlip)


def test_each_setting_reaches_its_wrapper():
    settings = {
        "scales": [0.5, 2.0],
        "flip": True,
        "short_side": 100,
        "long_side": 200,
        "window": [30, 40],
        "stride": [10, 20],
        "batch_size": 3,
        "pad_value": [1.0, 2.0, 3.0],
        "accumulate_on_cpu": True,
    }
    assert settings.keys() == {field.name for field in dataclasses.fields(InferenceProtocol)}
    views = InferenceProtocol(**settings)(Model(pixelwise))
    windows = views.model
    assert (views.scales, views.flip) == ((0.5, 2.0), True)
    assert (views.short_side, views.long_side) == (100, 200)
    assert (windows.window, windows.stride, windows.batch_size) == ((30, 40), (10, 20), 3)
    assert windows.pad_value == (1.0, 2.0, 3.0)
    assert views.accumulate_on_cpu and windows.accumulate_on_cpu


def test_mistakes_are_named_before_there_is_a_model(subtests: pytest.Subtests) -> None:
    for settings, message in [
        ({"scales": []}, r"scales=\[\]: give at least one"),
        ({"scales": [1.0, 0.0]}, r"scales=\[1.0, 0.0\]: .* above 0"),
        ({"scales": [-1.0]}, "above 0"),
        ({"scales": [float("nan")]}, "above 0"),
        ({"scales": [1.0, 0.5, 1]}, "name each once"),
        ({"scales": 0.5}, r"scales=0.5: give a list"),
        ({"flip": "no"}, "flip='no': must be True or False"),
        ({"accumulate_on_cpu": 1}, "accumulate_on_cpu=1: must be"),
        ({"short_side": 0}, "short_side=0: needs a whole number of 1 or more"),
        ({"long_side": 0.5}, "long_side=0.5: needs a whole number"),
        ({"window": 0}, "window=0: give"),
        ({"window": (8, -1)}, "window=.*: give"),
        ({"window": (8, 8, 8)}, "window=.*: give"),
        ({"window": 8.5}, "window=8.5: give"),
        ({"window": 8, "stride": 0}, "stride=0: give"),
        ({"window": (8, 16), "stride": 9}, r"stride=\(9, 9\) is beyond window=\(8, 16\)"),
        ({"stride": 9}, "stride=9 without windows: set window too"),
        ({"window": 8, "batch_size": 0}, "batch_size=0: needs"),
    ]:
        with subtests.test(settings=settings):
            with pytest.raises(ValueError, match=message):
                InferenceProtocol(**settings)


def test_a_colour_for_each_channel():
    with pytest.raises(ValueError, match="pad_value.*1.*3 channels"):
        SlidingWindow(Model(pixelwise), window=32, pad_value=[0.0])([sample(8, 8)])


# Experiment files and the command line


class NineClasses(Model):
    """Scores of the shapes dataset's nine classes from the colours of a pixel and its right."""

    def __init__(self) -> None:
        weights = torch.randn(9, 3, 1, 3)
        super().__init__(lambda x: F.conv2d(x.float()[None] / 64, weights, padding=(0, 1))[0])


def shapes_config(*overrides: str) -> DictConfig:
    cfg = load_config(CONFIG, ["dataloader.test.num_workers=0", *overrides])
    cfg.dataloader.evaluator.output_dir = None
    return cfg


def test_overrides_change_what_is_evaluated(caplog: pytest.LogCaptureFixture):
    cfg = shapes_config(
        "dataloader.inference.scales=[0.5,1.0]",
        "dataloader.inference.flip=True",
        "dataloader.inference.window=[48,128]",
        "dataloader.inference.batch_size=2",
    )
    model = NineClasses().train()
    with caplog.at_level("INFO", logger="contrast_d2"):
        evaluate = build_evaluation(cfg)
    assert "InferenceProtocol(scales=[0.5, 1.0], flip=True" in caplog.text
    several = evaluate(model)
    assert model.training
    # Filled up to the window with the mean that the model of the config has.
    filled = model.batches[0][0]["image"][:, :, 64:]
    assert torch.equal(filled, torch.tensor(cfg.model.pixel_mean).view(3, 1, 1).expand(3, 48, 64))

    single = build_evaluation(shapes_config())(model)
    assert several["sem_seg"]["pACC"] != single["sem_seg"]["pACC"]
    evaluator = SemSegEvaluator(cfg.dataset.test)
    bare = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    assert single == bare
    del cfg.dataloader.inference  # as in a config of a user's own
    assert build_evaluation(cfg)(model) == bare


def test_a_mistake_stops_before_data_are_read():
    cfg = shapes_config("dataloader.inference.scales=[0]", "dataloader.test.dataset=not_there")
    with pytest.raises(ValueError, match=r"scales=\[0.0\]"):
        build_evaluation(cfg)


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith("_")])
def test_presets(name: str, tmp_path: Path):
    cfg = shapes_config()
    cfg.dataloader.inference = PRESETS[name]
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    cfg = load_config(str(tmp_path / "config.yaml"))
    protocol = instantiate(cfg.dataloader.inference)
    assert list(protocol.pad_value) == list(cfg.model.pixel_mean)
    model = Model(pixelwise)
    height, width = (64, 128) if "cityscapes" in name else (334, 500)
    (scores,) = scores_of(protocol(model), sample(height, width))
    assert scores.shape == (4, height, width)
    expected = {
        "whole_image": {(334, 500)},
        "ade20k_short_side": {(512, 766)},
        "pascal_context": {(512, 766)},
        "pascal_context_multi_scale": {(512, 512)},
        "cityscapes_multi_scale": {(16 * s, 32 * s) for s in range(3, 9)},
    }
    if name in expected:
        assert set(model.sizes) == expected[name]
    assert (
        len(model.sizes)
        == {
            "whole_image": 1,
            "ade20k_short_side": 1,
            "pascal_context": 1,
            "cityscapes_multi_scale": 12,
            "contextrast_multi_scale": 12,
            "ade20k_multi_scale": 12,
            "ade20k_short_side_multi_scale": 12,
            "pixel_contrast_multi_scale": 14,
            # Long sides of 260, 390, 520, 650, 780, 910 and 1040.
            "pascal_context_multi_scale": 2 * (1 + 1 + 2 + 2 + 4 + 6 + 6),
        }[name]
    )
