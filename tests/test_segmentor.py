"""The meta-architecture. Shape letters: B images, K classes, H W images, h w a feature map."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.modeling import FPN, SemanticSegmentor
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.postprocessing import sem_seg_postprocess
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from contrast_d2.backbones import TimmBackbone
from contrast_d2.contrast import (
    BalancedSampler,
    ContrastOutput,
    MultiScaleContrast,
    MultiScaleProjector,
)
from contrast_d2.data import SemSegMapper
from contrast_d2.decoders import FCNDecoder, SemSegFPNDecoder
from contrast_d2.losses import AdaptiveAffinityLoss, CrossEntropyLoss, SegLoss, upsample
from contrast_d2.segmentor import ContrastiveSegmentor, inference_state_dict

from .backbones.rows import NAMES, detectron2_resnet18

CONFIGS = Path(__file__).parents[1] / "configs" / "camvid"
NUM_CLASSES = 5
MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
WEIGHTS = {"res2": 1.0, "res3": 0.7, "res4": 0.4, "res5": 0.1}
CROSS = [("res2", "res5", 1.0), ("res2", "res4", 1.0)]

Batch = list[dict[str, Any]]


def contrast_on(channels: dict[str, int], weights: dict[str, float], cross=()) -> nn.Module:
    return MultiScaleContrast(
        MultiScaleProjector(channels, 16, num_hidden=1),
        BalancedSampler(NUM_CLASSES, max_anchors=200, min_per_class=8),
        scale_weights=weights,
        cross_scale=cross,
    )


def build(*, decoder: type[nn.Module] = SemSegFPNDecoder, **parts: Any) -> ContrastiveSegmentor:
    """A small HRNet; `parts` are arguments of the segmentor."""
    backbone = parts.pop("backbone", None) or TimmBackbone("hrnet_w18_small")
    options = {"fpn_channels": 16, "conv_dims": 32} if decoder is SemSegFPNDecoder else {}
    return ContrastiveSegmentor(
        backbone=backbone,
        sem_seg_head=decoder(backbone.output_shape(), num_classes=NUM_CLASSES, **options),
        pixel_mean=MEAN,
        pixel_std=STD,
        seg_loss=SegLoss(CrossEntropyLoss()),
        **parts,
    )


def with_contrast() -> ContrastiveSegmentor:
    channels = {"res2": 16, "res3": 32, "res4": 64, "res5": 128}
    return build(contrast=contrast_on(channels, WEIGHTS, CROSS))


def sample(height: int = 64, width: int = 96) -> dict[str, Any]:
    """An image of large blocks of classes, some of them ignored."""
    blocks = torch.randint(0, NUM_CLASSES + 1, (-(-height // 16), -(-width // 16)))
    labels = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:height, :width].clone()
    labels[labels == NUM_CLASSES] = 255
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "sem_seg": labels, "file_name": f"{height}x{width}.png"}


class Recorder(nn.Module):
    """Keeps what a contrast method is given."""

    def forward(self, features, labels, logits, *, ignore_label) -> ContrastOutput:
        self.features, self.logits, self.labels = features, logits, labels
        return ContrastOutput({}, {})


# --- The inference graph is the baseline's.


@pytest.fixture(
    scope="module",
    params=["semfpn_r18_ms_cs_cpu", "fcn_hrnet18_ms_cs_6k", "semfpn_swin_tiny_ms_cs_6k"],
)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A model that was trained a step with contrast, and its baseline; both in evaluation."""
    cfg = LazyConfig.load(str(CONFIGS / f"{request.param}.py"))
    cfg.model.backbone.pretrained = False
    torch.manual_seed(3)
    model = instantiate(cfg.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(model([sample(), sample()]).values()).backward()
    optimizer.step()
    cfg.model.contrast = None
    return model.eval(), instantiate(cfg.model).eval()


def test_exported_weights_are_the_baselines(pair) -> None:
    model, baseline = pair
    weights = inference_state_dict(model)
    assert list(weights) == list(baseline.state_dict())
    assert len(weights) < len(model.state_dict())
    inference_modules = [n for n, _ in model.named_modules() if n.split(".")[0] != "contrast"]
    assert inference_modules == [name for name, _ in baseline.named_modules()]


def test_output_is_the_baselines_bit_for_bit(pair) -> None:
    model, baseline = pair
    batch = [sample(64, 96), {**sample(50, 83), "height": 100, "width": 150}]
    with torch.no_grad():
        before = baseline(batch)
        baseline.load_state_dict(inference_state_dict(model))
        found, expected = model(batch), baseline(batch)
    assert not torch.equal(before[0]["sem_seg"], expected[0]["sem_seg"])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x["sem_seg"], y["sem_seg"])
    assert expected[1]["sem_seg"].shape[1:] == (100, 150)


def test_contrast_never_runs_in_evaluation(pair) -> None:
    model, _ = pair
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: called.append(module))
        for module in model.contrast.modules()
    ]
    model([sample()])
    assert not called
    model.train()([sample(), sample()])
    assert model.contrast in called  # and in training it does
    model.eval()
    for hook in hooks:
        hook.remove()


class Scores(nn.Module):
    """The segmentor as a function of tensors, for tracing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model([{"image": image}])[0]["sem_seg"]


def test_flops_are_the_baselines(pair) -> None:
    image = sample()["image"]
    counts = []
    for model in pair:
        analysis = FlopCountAnalysis(Scores(model), image)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts.append(analysis.by_module())
    with_contrast_, without = counts
    assert without["model.backbone"] > 1e7 and without["model.sem_seg_head"] > 1e6
    assert with_contrast_[""] == without[""]
    assert not any(n for name, n in with_contrast_.items() if name.startswith("model.contrast"))


def test_checkpoint_of_contrast_loads_into_the_baseline(tmp_path: Path) -> None:
    model, baseline = with_contrast(), build()
    DetectionCheckpointer(model, str(tmp_path)).save("model")
    DetectionCheckpointer(baseline).load(str(tmp_path / "model.pth"))
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in baseline.state_dict().items())


def test_parameters_of_a_loss_are_trained_and_not_exported() -> None:
    model, baseline = build(), build()
    model.seg_loss = SegLoss(AdaptiveAffinityLoss(NUM_CLASSES))
    sum(model([sample(), sample()]).values()).backward()
    assert all(p.grad.any() for p in model.seg_loss.parameters())
    weights = inference_state_dict(model)
    assert list(weights) == list(baseline.state_dict())
    assert len(weights) < len(model.state_dict())


# --- Against detectron2's own segmentor.


def detectron2_pair() -> tuple[SemanticSegmentor, ContrastiveSegmentor]:
    fpn = FPN(detectron2_resnet18(), list(NAMES), 16)
    options = {"num_classes": NUM_CLASSES, "conv_dims": 32, "common_stride": 4, "norm": "GN"}
    head = SemSegFPNHead(fpn.output_shape(), ignore_value=255, **options)
    theirs = SemanticSegmentor(
        backbone=fpn, sem_seg_head=head, pixel_mean=MEAN, pixel_std=STD
    ).eval()
    decoder = SemSegFPNDecoder(fpn.output_shape(), fpn_channels=None, **options)
    ours = ContrastiveSegmentor(
        backbone=fpn,
        sem_seg_head=decoder,
        pixel_mean=MEAN,
        pixel_std=STD,
        seg_loss=SegLoss(CrossEntropyLoss()),
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_scores_and_loss_are_detectron2s() -> None:
    theirs, ours = detectron2_pair()
    batch = [sample(61, 83), {**sample(64, 50), "height": 128, "width": 100}]
    with torch.no_grad():
        for x, y in zip(ours(batch), theirs(batch), strict=True):
            assert torch.equal(x["sem_seg"], y["sem_seg"])
        found, expected = ours.train()(batch), theirs.train()(batch)
    assert found.keys() == expected.keys() == {"loss_sem_seg"}
    torch.testing.assert_close(found["loss_sem_seg"], expected["loss_sem_seg"])


def test_detectron2s_resnet_with_our_pyramid_takes_any_size() -> None:
    # This backbone asks for no padding, and 45 rows at stride 8 are no two times 23 at stride 16.
    model = build(
        backbone=detectron2_resnet18(),
        contrast=contrast_on({"res2": 64, "res5": 512}, {"res2": 1.0, "res5": 1.0}),
    )
    losses = model([sample(61, 83), sample(52, 90)])
    assert losses.keys() == {"loss_sem_seg", "loss_contrast_res2", "loss_contrast_res5"}
    assert all(loss.isfinite() for loss in losses.values())
    assert model.eval()([sample(61, 83)])[0]["sem_seg"].shape == (NUM_CLASSES, 61, 83)


# --- Training.


def test_images_and_labels_are_padded_alike() -> None:
    model = build(contrast=Recorder(), ignore_label=9)
    model.seg_loss = SegLoss(CrossEntropyLoss(ignore_label=9))
    batch = [sample(61, 83), sample(64, 50)]
    for x in batch:
        x["sem_seg"][x["sem_seg"] == 255] = 9
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(batch)
    images, labels = seen[0], model.contrast.labels
    assert images.shape == (2, 3, 64, 96) and labels.shape == (2, 64, 96)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for image, label, x in zip(images, labels, batch, strict=True):
        height, width = x["sem_seg"].shape
        torch.testing.assert_close(image[:, :height, :width], (x["image"] - mean) / std)
        assert torch.equal(label[:height, :width], x["sem_seg"])
        assert not image[:, height:].any() and not image[:, :, width:].any()
        assert (label[height:] == 9).all() and (label[:, width:] == 9).all()


@pytest.mark.parametrize("ignore_label", [255, -1])
def test_labels_are_bytes_up_to_the_device(ignore_label: int) -> None:
    """The loss gets int64, and the contrast what came, where an ignore label of -1 fits into it."""
    model = build(contrast=Recorder(), ignore_label=ignore_label)
    seen: list[Tensor] = []

    def seg_loss(output, labels: Tensor) -> dict[str, Tensor]:
        seen.append(labels)
        return {}

    del model.seg_loss
    model.seg_loss = seg_loss
    batch = [sample(61, 83), sample(64, 50)]
    whole = [x["sem_seg"].clone() for x in batch]
    for x in batch:
        x["sem_seg"] = x["sem_seg"].to(torch.uint8)
    model(batch)
    assert seen[0].dtype == torch.int64
    assert model.contrast.labels.dtype == (torch.uint8 if ignore_label == 255 else torch.int64)
    for labels in (seen[0], model.contrast.labels):
        assert torch.equal(labels[0, :61, :83], whole[0].to(labels.dtype))
        assert (labels[1, :, 50:] == ignore_label).all() and (labels[0, 61:] == ignore_label).all()


def test_bytes_and_int64_give_the_same_losses() -> None:
    model = with_contrast()
    batch = [sample(61, 83), sample(64, 50)]
    results = []
    for dtype in (torch.int64, torch.uint8, torch.int16):
        torch.manual_seed(0)
        results.append(model([{**x, "sem_seg": x["sem_seg"].to(dtype)} for x in batch]))
    assert results[0]["loss_contrast_res2"] > 0
    assert results[0] == results[1] == results[2]


def test_bytes_and_floats_in_one_batch() -> None:
    """As a test protocol makes them, which resizes one image and not the other."""
    model = build().eval()
    images = [sample(64, 96)["image"], sample(64, 96)["image"]]
    with torch.no_grad():
        expected = model([{"image": x} for x in images])
        found = model([{"image": images[0]}, {"image": images[1].float()}])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x["sem_seg"], y["sem_seg"])


def test_an_output_of_the_size_of_its_image_is_not_resized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build().eval()
    batch = [sample(61, 83), sample(64, 50)]
    calls: list[tuple[int, ...]] = []

    def resize(scores: Tensor, *sizes: Any) -> Tensor:
        calls.append(sizes)
        return sem_seg_postprocess(scores, *sizes)

    monkeypatch.setattr("contrast_d2.segmentor.sem_seg_postprocess", resize)
    logits: list[Tensor] = []
    model.sem_seg_head.predictor.register_forward_hook(lambda *args: logits.append(args[2]))
    with torch.no_grad():
        found = model(batch)
        model([{**batch[0], "height": 30, "width": 83}])
    assert calls == [((61, 83), 30, 83)]
    scores = upsample(logits[0], (64, 96))
    for result, whole, size in zip(found, scores, [(61, 83), (64, 50)], strict=True):
        assert torch.equal(result["sem_seg"], sem_seg_postprocess(whole, size, *size))


def test_padding_does_not_enter_the_loss() -> None:
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # in training it would mix the images
    small, large = sample(32, 64), sample(64, 96)
    small["sem_seg"].fill_(255)
    alone, together = model([large])["loss_sem_seg"], model([large, small])["loss_sem_seg"]
    torch.testing.assert_close(alone, together)


def test_contrast_sees_all_features_and_the_logits() -> None:
    model = build(contrast=Recorder())
    model([sample(), sample()])
    seen = model.contrast
    assert set(seen.features) == {*NAMES, "p2", "p3", "p4", "p5", "pre_logits"}
    assert all(x.requires_grad for x in seen.features.values())
    assert seen.logits.shape == (2, NUM_CLASSES, 16, 24)


def test_losses_and_gradients() -> None:
    model = with_contrast()
    losses = model([sample(), sample()])
    terms = ["res2", "res3", "res4", "res5", "res2_res5", "res2_res4"]
    assert set(losses) == {"loss_sem_seg", *(f"loss_contrast_{term}" for term in terms)}
    assert all(x.shape == () and x.dtype == torch.float32 and x > 0 for x in losses.values())
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_contrast_trains_the_backbone_and_not_the_decoder() -> None:
    model = with_contrast()
    losses = model([sample(), sample()])
    sum(loss for name, loss in losses.items() if name != "loss_sem_seg").backward()
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    assert all(p.grad is None for p in model.sem_seg_head.parameters())


@pytest.mark.parametrize(
    ("decoder", "channels"),
    [(SemSegFPNDecoder, {"p2": 16, "p5": 16}), (FCNDecoder, {"concat": 240, "res5": 128})],
)
def test_contrast_on_maps_of_the_decoder(decoder: type[nn.Module], channels) -> None:
    first, second = channels
    contrast = contrast_on(channels, {first: 1.0}, [(first, second, 1.0)])
    model = build(decoder=decoder, contrast=contrast)
    losses = model([sample(), sample()])
    assert set(losses) == {
        "loss_sem_seg",
        f"loss_contrast_{first}",
        f"loss_contrast_{first}_{second}",
    }
    losses[f"loss_contrast_{first}"].backward()
    if decoder is SemSegFPNDecoder:
        assert model.sem_seg_head.fpn.fpn_lateral5.weight.grad.any()
    assert next(model.backbone.parameters()).grad.any()


def test_autocast_keeps_losses_in_fp32() -> None:
    model = with_contrast()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([sample(), sample()])
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_nothing_to_learn_from_gives_zero() -> None:
    model = with_contrast()
    batch = [sample(), sample()]
    for x in batch:
        x["sem_seg"].fill_(255)
    losses = model(batch)
    assert model.statistics["contrast/res2/anchors"] == 0
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(losses, 0.0)
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or p.grad.any()]


def test_statistics_stay_out_of_the_losses() -> None:
    model = with_contrast()
    assert model.statistics == {}
    losses = model([sample(), sample()])
    assert not [name for name in losses if "/" in name]
    statistics = model.statistics
    terms = ["res2", "res3", "res4", "res5", "res2_res5", "res2_res4"]
    quantities = ["anchors", "classes", "positive_similarity", "negative_similarity"]
    expected = {f"contrast/{term}/{q}" for term in terms for q in quantities}
    assert set(statistics) == {"contrast/ignored_share", *expected}
    assert not [name for name, value in statistics.items() if value.requires_grad or value.dim()]
    assert 2 <= statistics["contrast/res2/classes"] <= NUM_CLASSES
    assert statistics["contrast/res2/classes"] <= statistics["contrast/res2/anchors"] <= 200
    assert -1 <= statistics["contrast/res2/negative_similarity"] <= 1


def test_an_image_without_labels_is_named() -> None:
    batch = [sample(64, 96), sample(32, 48)]
    del batch[1]["sem_seg"]
    with pytest.raises(ValueError, match="'32x48.png' came without 'sem_seg'"):
        build()(batch)


def test_labels_of_another_size_than_their_image_are_refused() -> None:
    x = sample(64, 96)
    x["sem_seg"] = x["sem_seg"][:, :80]
    with pytest.raises(ValueError, match=r"is \(64, 96\) and its labels are \(64, 80\)"):
        build()([x])


def test_scores_are_resized_as_the_decoder_says() -> None:
    model = build(decoder=FCNDecoder).eval()
    image = 255 * torch.rand(3, 64, 96)
    for align_corners in (False, True):
        model.sem_seg_head.align_corners = align_corners
        features = model.backbone(model.preprocess_image([{"image": image}]))
        logits = model.sem_seg_head.decode(features).logits
        expected = nn.functional.interpolate(
            logits, (64, 96), mode="bilinear", align_corners=align_corners
        )
        torch.testing.assert_close(model([{"image": image}])[0]["sem_seg"], expected[0])


def test_evaluation_needs_no_labels_and_gives_the_requested_size() -> None:
    model = build().eval()
    scores = model([{"image": sample(61, 83)["image"], "height": 122, "width": 40}])
    assert scores[0]["sem_seg"].shape == (NUM_CLASSES, 122, 40)
    assert model([{"image": sample(61, 83)["image"]}])[0]["sem_seg"].shape[1:] == (61, 83)


def test_a_map_that_the_model_lacks_is_named() -> None:
    model = build(contrast=contrast_on({"res9": 4}, {"res9": 1.0}))
    with pytest.raises(ValueError, match="'res9'.*'res5'"):
        model([sample(), sample()])


def test_the_loss_falls_on_real_images(camvid: Path) -> None:
    mapper = SemSegMapper(
        dataset_name="camvid_sem_seg_train", augmentations=[T.Resize((96, 128))], is_train=True
    )
    records = DatasetCatalog.get("camvid_sem_seg_train")
    batch = [mapper(records[i]) for i in (0, 200)]
    cfg = LazyConfig.load(str(CONFIGS / "semfpn_r18_ms_cs_cpu.py"))
    model = instantiate(cfg.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(12):
        losses = model(batch)
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    contrast = [
        sum(value for name, value in row.items() if name != "loss_sem_seg") for row in history
    ]
    # Guessing evenly among the 11 classes costs log 11; the weights start far above it.
    assert history[-1]["loss_sem_seg"] < math.log(11) / 2 < history[0]["loss_sem_seg"]
    assert contrast[-1] < 0.95 * contrast[0]
