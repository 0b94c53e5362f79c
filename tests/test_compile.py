"""`torch.compile` of the whole training forward: few graphs, the same losses, no graph per step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from contrast_d2.backbones import TimmBackbone
from contrast_d2.contrast import BalancedSampler, MultiScaleContrast, MultiScaleProjector
from contrast_d2.decoders import SemSegFPNDecoder
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.segmentor import ContrastiveSegmentor

NUM_CLASSES = 5
PROJECTIONS = {
    "dense": {},
    "batch": {"projection": "sampled"},
    "layer": {"norm": "layer", "projection": "sampled"},
}


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(projection: str, scales: int, **sampler: Any) -> ContrastiveSegmentor:
    """A small network with `scales` contrast terms."""
    torch.manual_seed(0)
    channels = dict(list({"res2": 32, "res3": 48, "res4": 192, "res5": 96}.items())[:scales])
    backbone = TimmBackbone("test_resnet")
    contrast = MultiScaleContrast(
        MultiScaleProjector(channels, 16, num_hidden=1, **PROJECTIONS[projection]),
        BalancedSampler(NUM_CLASSES, max_anchors=200, min_per_class=8, **sampler),
        scale_weights=dict.fromkeys(channels, 1.0),
    )
    model = ContrastiveSegmentor(
        backbone=backbone,
        sem_seg_head=SemSegFPNDecoder(
            backbone.output_shape(), num_classes=NUM_CLASSES, fpn_channels=16, conv_dims=32
        ),
        pixel_mean=[120.0, 110.0, 100.0],
        pixel_std=[60.0, 50.0, 40.0],
        seg_loss=SegLoss(CrossEntropyLoss()),
        contrast=contrast,
    )
    return model.train()


def random_batch() -> list[dict[str, Any]]:
    """Images of different sizes, so that they are padded."""
    return [
        {
            "image": torch.randint(0, 256, (3, height, 64), dtype=torch.uint8),
            "sem_seg": torch.randint(0, NUM_CLASSES, (height // 8, 8))
            .repeat_interleave(8, 0)
            .repeat_interleave(8, 1),
        }
        for height in (64, 56)
    ]


@pytest.mark.parametrize(("projection", "scales"), [("dense", 1), ("dense", 3), ("layer", 1)])
def test_all_terms_break_the_graph_once(projection: str, scales: int) -> None:
    explanation = torch._dynamo.explain(build(projection, scales))(random_batch())
    assert explanation.graph_count == 2
    assert len(explanation.break_reasons) >= 1


@pytest.mark.parametrize(
    "projection", ["dense", "batch", pytest.param("layer", marks=pytest.mark.slow)]
)
def test_losses_and_gradients_are_those_of_the_eager_model(projection: str) -> None:
    # In fp64: the rounding of fp32 can carry an activation over the kink of a ReLU, where the
    # gradient jumps. The scores alone are rounded to fp32, to 6e-8.
    eager, compiled = (build(projection, 2).double() for _ in range(2))
    backend = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, backend=backend)
    graphs = []
    for _ in range(3):
        batch = random_batch()
        losses, expected = {}, {}
        for model, forward, result in ((eager, eager, expected), (compiled, run, losses)):
            model.zero_grad()
            torch.manual_seed(7)
            result.update(forward(batch))
            sum(result.values()).backward()
        torch.testing.assert_close(losses, expected)
        assert len(losses) == 3
        for (name, one), other in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), name
        torch.testing.assert_close(compiled.statistics, eager.statistics, equal_nan=True)
        graphs.append(backend.frame_count)
    # Another draw is no reason to compile anew.
    assert graphs[0] == graphs[-1] > 0
