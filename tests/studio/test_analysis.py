"""What a network costs by part, and the proof that contrast leaves no trace at test time."""

from __future__ import annotations

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from contrast_d2.contrast import ContrastSum
from contrast_d2.decoders import FCNDecoder, OCRDecoder
from contrast_d2.segmentor import ContrastiveSegmentor
from contrast_d2.studio.analysis import (
    analyze,
    attention_flops,
    capture_inference,
    inference_differences,
)

from ..tiny import CHANNELS, NUM_CLASSES, tiny_contrast, tiny_segmentor

# Padded to 64x96.
SIZE = (60, 90)
PIXELS = {"res2": 16 * 24, "res3": 8 * 12}


def number_of_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parts_are_told_apart() -> None:
    model = tiny_segmentor(tiny_contrast())
    cost = analyze(model, SIZE)
    head = model.sem_seg_head
    assert list(cost.inference) == ["backbone", "decoder", "other"]
    backbone, decoder, other = cost.inference.values()
    assert backbone.parameters == number_of_parameters(model.backbone)
    assert backbone.flops == PIXELS["res2"] * 8 * 48 + PIXELS["res3"] * 12 * 32
    assert backbone.activations == PIXELS["res2"] * 8 + PIXELS["res3"] * 12
    assert decoder.parameters == number_of_parameters(head) - number_of_parameters(head.aux_head)
    assert other.parameters == other.activations == 0 and other.flops > 0

    assert list(cost.training_only) == ["auxiliary head", "contrast"]
    auxiliary, contrast = cost.training_only.values()
    # A 3x3 convolution from 12 to 10 channels with its norm, and the classifier.
    assert auxiliary.parameters == 9 * 12 * 10 + 2 * 10 + 11 * NUM_CLASSES
    products = PIXELS["res3"] * (9 * 12 * 10 + 10 * NUM_CLASSES)
    assert products < auxiliary.flops < 1.06 * products  # and the norm
    assert auxiliary.activations == PIXELS["res3"] * (10 + NUM_CLASSES)
    # Two 1x1 convolutions for each map, and a norm between them.
    assert contrast.parameters == number_of_parameters(model.contrast)
    products = sum(PIXELS[n] * (c * c + c * 8) for n, c in CHANNELS.items())
    assert products < contrast.flops < 1.2 * products
    assert contrast.activations == sum(PIXELS[n] * (c + 8) for n, c in CHANNELS.items())
    assert cost.uncounted and "aten::_convolution" not in cost.uncounted


def test_multiply_adds_are_half_of_pytorchs_operations() -> None:
    model = tiny_segmentor(decoder=OCRDecoder, channels=16, key_channels=8, norm="")
    cost = analyze(model, SIZE)
    assert cost.training_only == {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model([{"image": torch.rand(3, *SIZE)}])
    # What fvcore counts besides, four for each element: maps that are joined, regions, scores at
    # the size of the padded image, which are cropped to that of the image.
    resized = (12 + NUM_CLASSES) * PIXELS["res2"] + NUM_CLASSES * 64 * 96
    total = sum(part.flops for part in cost.inference.values())
    assert total == counter.get_total_flops() / 2 + 4 * resized


class Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def test_fused_attention_counts_both_products() -> None:
    inputs = (torch.rand(2, 3, 7, 4), torch.rand(2, 3, 11, 4), torch.rand(2, 3, 11, 5))
    name = "aten::scaled_dot_product_attention"
    flops = FlopCountAnalysis(Attention(), inputs).set_op_handle(name, attention_flops)
    assert flops.total() == 2 * 3 * 7 * 11 * (4 + 5)


def test_a_head_that_methods_share_counts_once() -> None:
    alone = tiny_segmentor(tiny_contrast())
    both = tiny_segmentor(ContrastSum({"one": tiny_contrast(), "two": tiny_contrast()}))
    costs = [analyze(model, SIZE).training_only["contrast"] for model in (alone, both)]
    assert costs[0] == costs[1]


# The proof


def test_contrast_leaves_no_trace() -> None:
    method, baseline = tiny_segmentor(tiny_contrast()), tiny_segmentor()
    nn.init.constant_(method.sem_seg_head.predictor.bias, 3.0)
    assert inference_differences(method, baseline, SIZE) == []
    assert (baseline.sem_seg_head.predictor.bias == 3).all()
    state = capture_inference(method, SIZE).state
    assert {"backbone.stem.weight", "sem_seg_head.predictor.bias", "pixel_mean"} <= state
    assert not [name for name in state if "aux_head" in name or "contrast" in name]


class Leaking(ContrastiveSegmentor):
    """Runs a projector in evaluation."""

    def _at_output_size(self, output, images, batched_inputs):
        unused = 0 * self.contrast.projector.heads["res2"](output.logits).mean()
        output = output._replace(logits=output.logits + unused)
        return super()._at_output_size(output, images, batched_inputs)


def test_a_contrast_that_runs_is_found() -> None:
    method, baseline = (tiny_segmentor(c, FCNDecoder) for c in (tiny_contrast(), None))
    method.contrast.projector.heads["res2"] = nn.Conv2d(NUM_CLASSES, 1, kernel_size=1)
    method.__class__ = Leaking
    leak, graphs, flops = inference_differences(method, baseline, SIZE)
    name = "contrast.projector.heads.res2.bias"
    assert leak == f"the contrast method runs: the graph reads {name}"
    assert graphs.startswith("graphs differ: ") and flops.startswith("FLOPs differ: ")


class Shifted(ContrastiveSegmentor):
    """Adds a buffer that no checkpoint holds."""

    def _at_output_size(self, output, images, batched_inputs):
        output = output._replace(logits=output.logits + self.shift)
        return super()._at_output_size(output, images, batched_inputs)


def test_other_scores_are_found() -> None:
    method, baseline = (tiny_segmentor(c, FCNDecoder) for c in (tiny_contrast(), None))
    for model, shift in ((method, 0.5), (baseline, 0.25)):
        model.register_buffer("shift", torch.tensor(shift), persistent=False)
        model.__class__ = Shifted
    (scores,) = inference_differences(method, baseline, SIZE)
    assert scores == "scores differ by up to 2.5e-01"


def test_another_network_is_found() -> None:
    (weights,) = inference_differences(
        tiny_segmentor(tiny_contrast()), tiny_segmentor(decoder=FCNDecoder), SIZE
    )
    assert weights.startswith("weights differ: ")
