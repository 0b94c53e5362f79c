"""Random cases for every segmentation loss. Shape letters: B images, K classes, H W labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from .rows import IGNORED, LOSSES, NUM_CLASSES

_DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """A loss and what it is fed.

    Attributes:
        loss: key of `LOSSES`.
        seed: of all random numbers.
        images, height, width: B, H, W; 3 or more a side, for patches of the region loss.
        classes_shown: of the K classes so many are in the labels.
        ignored: share of the pixels.
        scale: of the scores; 0 makes them equal, 1e4 certain.
        right: share of the pixels whose largest score is that of their class.
        dtype: of the scores.
    """

    loss: str
    seed: int
    images: int = 2
    height: int = 8
    width: int = 8
    classes_shown: int = NUM_CLASSES
    ignored: float = 0.1
    scale: float = 1.0
    right: float = 0.5
    dtype: str = "fp32"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        loss=draw(st.sampled_from(list(LOSSES))),
        seed=draw(st.integers(0, 2**32 - 1)),
        images=draw(st.integers(1, 3)),
        height=draw(st.integers(3, 20)),
        width=draw(st.integers(3, 20)),
        classes_shown=draw(st.integers(1, NUM_CLASSES)),
        ignored=draw(st.sampled_from([0.0, 0.2, 0.99, 1.0]) | st.floats(0, 1, width=16)),
        scale=draw(st.sampled_from([0.0, 1e-6, 1.0, 30.0, 1e4])),
        right=draw(st.sampled_from([0.0, 0.5, 1.0])),
        dtype=draw(st.sampled_from(list(_DTYPES))),
    )


def run_case(case: Case) -> bool:
    """Evaluates and differentiates a loss, and checks what comes out.

    Returns:
        Whether the loss was not 0.

    Raises:
        AssertionError: a value or gradient that is not finite, or a gradient that is not there.
    """
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.images, case.height, case.width)
    classes = torch.randint(case.classes_shown, shape, generator=generator)
    guess = torch.randint(NUM_CLASSES, shape, generator=generator)
    right = torch.rand(shape, generator=generator) < case.right
    best = torch.nn.functional.one_hot(classes.where(right, guess), NUM_CLASSES)
    noise = torch.rand(best.shape, generator=generator)
    scores = case.scale * (2 * best - 1 + 0.1 * noise).permute(0, 3, 1, 2)
    labels = classes.masked_fill(torch.rand(shape, generator=generator) < case.ignored, IGNORED)

    loss = LOSSES[case.loss]()
    logits = scores.to(_DTYPES[case.dtype]).requires_grad_()
    value = loss(logits, labels)
    assert value.shape == () and value.isfinite(), f"{case.loss} = {value}"
    value.backward()
    assert logits.grad is not None and logits.grad.isfinite().all(), "gradient of the scores"
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    return value.item() != 0
