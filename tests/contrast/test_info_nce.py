"""The supervised InfoNCE against its equations. Shape letters: A anchors, C contrast, D width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from contrast_d2.contrast import info_nce
from contrast_d2.contrast.kernels import masked
from contrast_d2.contrast.kernels import sorted as sorted_kernel

from . import references
from .rounding import largest_error, rounding

# Class 3 has one anchor (no positive); class 0 is a class like any other.
LABELS = [0, 2, 0, 1, 1, 2, 0, 3, 1, 0]
# Class 1 is absent, class 4 has no anchor, and the negative ones are unfilled slots.
CONTRAST_LABELS = [2, -1, 0, 0, 4, 2, 3, -1]


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def with_gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.fixture(params=["sorted", "masked"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with both kernels that a CPU has."""
    assert "is_exact" in info_nce.__globals__
    if request.param == "masked":
        monkeypatch.setitem(info_nce.__globals__, "is_exact", lambda *_: False)
    return request.param


def set_blocks(monkeypatch: pytest.MonkeyPatch, rows: int, num_contrast: int) -> None:
    """Bounds the rows of one block of similarities."""
    monkeypatch.setattr(masked, "_BLOCK_ELEMENTS", rows * num_contrast)
    monkeypatch.setattr(sorted_kernel, "_BLOCK_ELEMENTS", rows * num_contrast)
    monkeypatch.setattr(sorted_kernel, "_LEAST_ROWS", 1)
    monkeypatch.setattr(sorted_kernel, "_TILE_ELEMENTS", 0)
    monkeypatch.setattr(sorted_kernel, "_FEW_ROWS", 0)
    monkeypatch.setattr(sorted_kernel, "_ROWS", rows)
    monkeypatch.setattr(sorted_kernel, "_MIXED_ROWS", rows)
    monkeypatch.setattr(sorted_kernel, "_COLUMNS", 2 * rows)
    monkeypatch.setattr(sorted_kernel, "_WIDE_COLUMNS", 2 * rows)


# ---- the equations


@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_within_equals_the_equations(temperature: float, count_empty: bool) -> None:
    anchors = unit(len(LABELS), 4).requires_grad_()
    expected = references.within_loss(anchors, LABELS, temperature, count_empty)
    actual = info_nce(
        anchors, torch.tensor(LABELS), temperature=temperature, count_empty_anchors=count_empty
    )
    torch.testing.assert_close(
        with_gradients(actual, anchors), with_gradients(expected, anchors), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_cross_equals_the_equations(temperature: float, count_empty: bool) -> None:
    anchors = unit(len(LABELS), 4).requires_grad_()
    contrast = unit(len(CONTRAST_LABELS), 4).requires_grad_()
    expected = references.cross_loss(
        anchors, LABELS, contrast, CONTRAST_LABELS, temperature, count_empty
    )
    actual = info_nce(
        anchors,
        torch.tensor(LABELS),
        contrast,
        torch.tensor(CONTRAST_LABELS),
        temperature=temperature,
        count_empty_anchors=count_empty,
    )
    torch.testing.assert_close(
        with_gradients(actual, anchors, contrast),
        with_gradients(expected, anchors, contrast),
        rtol=1e-10,
        atol=1e-12,
    )


def test_anchors_that_lead_a_bank_equal_the_equations() -> None:
    anchors = unit(len(LABELS), 4).requires_grad_()
    bank = unit(len(CONTRAST_LABELS), 4).requires_grad_()
    contrast_labels = LABELS + CONTRAST_LABELS
    expected = references.cross_loss(
        anchors, LABELS, torch.cat([anchors, bank]), contrast_labels, 0.1, lead=True
    )
    actual = info_nce(
        anchors,
        torch.tensor(LABELS),
        torch.cat([anchors, bank]),
        torch.tensor(contrast_labels),
        temperature=0.1,
        anchors_lead_contrast=True,
    )
    torch.testing.assert_close(
        with_gradients(actual, anchors, bank),
        with_gradients(expected, anchors, bank),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("form", ["within", "cross", "bank"])
def test_gradcheck(form: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, rows, num_contrast=18)
    labels, other_labels = torch.tensor(LABELS), torch.tensor(CONTRAST_LABELS)
    anchors = unit(len(LABELS), 3).requires_grad_()
    other = unit(len(CONTRAST_LABELS), 3).requires_grad_()
    functions = {
        "within": lambda a, c: info_nce(a, labels, temperature=0.3) + 0 * c.sum(),
        "cross": lambda a, c: info_nce(a, labels, c, other_labels, temperature=0.3),
        "bank": lambda a, c: info_nce(
            a,
            labels,
            torch.cat([a, c]),
            torch.cat([labels, other_labels]),
            temperature=0.3,
            anchors_lead_contrast=True,
        ),
    }
    assert torch.autograd.gradcheck(functions[form], (anchors, other))


def test_gradient_of_one_set_when_the_other_is_constant() -> None:
    labels, other_labels = torch.tensor(LABELS), torch.tensor(CONTRAST_LABELS)
    anchors, contrast = unit(len(LABELS), 3), unit(len(CONTRAST_LABELS), 3)
    both = [anchors.clone().requires_grad_(), contrast.clone().requires_grad_()]
    of_anchors, of_contrast = torch.autograd.grad(
        info_nce(both[0], labels, both[1], other_labels), both
    )
    (alone,) = torch.autograd.grad(info_nce(both[0], labels, contrast, other_labels), both[0])
    torch.testing.assert_close(alone, of_anchors, rtol=0, atol=0)
    (alone,) = torch.autograd.grad(info_nce(anchors, labels, both[1], other_labels), both[1])
    torch.testing.assert_close(alone, of_contrast, rtol=0, atol=0)
    assert not info_nce(anchors, labels, contrast, other_labels).requires_grad


# ---- closed forms


def test_two_orthogonal_classes() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    loss = info_nce(embeddings, torch.tensor([0, 0, 1, 1]), temperature=1.0)
    # One positive of similarity 1 and two negatives of similarity 0 for each anchor.
    assert loss.item() == pytest.approx(math.log(1 + 2 / math.e), abs=1e-6)
    assert loss.item() == pytest.approx(0.5514, abs=5e-5)


@pytest.mark.parametrize("gap", [-30.0, 0.0, 25.0, 38.0, 700.0])
def test_large_gaps_are_exact_in_float64(gap: float) -> None:
    # One pair, whose negative is more similar than its positive by `gap`: ln(1 + e^gap).
    anchor, contrast = torch.ones(1, 1).double(), torch.tensor([[-gap], [0.0]]).double()
    loss = info_nce(anchor, torch.tensor([0]), contrast, torch.tensor([0, 1]), temperature=1.0)
    expected = max(gap, 0.0) + math.log1p(math.exp(-abs(gap)))
    assert loss.item() == pytest.approx(expected, rel=1e-15)


def test_one_class_gives_exactly_zero() -> None:
    embeddings = unit(6, 4, dtype=torch.float32).requires_grad_()
    loss, gradient = with_gradients(
        info_nce(embeddings, torch.zeros(6, dtype=torch.long)), embeddings
    )
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros(6, 4))


@pytest.mark.parametrize("count_empty", [False, True])
def test_no_positive_gives_exactly_zero(count_empty: bool) -> None:
    embeddings = unit(3, 4, dtype=torch.float32).requires_grad_()
    loss = info_nce(embeddings, torch.tensor([0, 1, 2]), count_empty_anchors=count_empty)
    loss, gradient = with_gradients(loss, embeddings)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros(3, 4))


@pytest.mark.parametrize(("num_anchors", "num_contrast"), [(0, 0), (0, 3), (3, 0)])
def test_empty_sets_give_a_connected_zero(num_anchors: int, num_contrast: int) -> None:
    anchors = unit(num_anchors, 4, dtype=torch.float32).requires_grad_()
    contrast = unit(num_contrast, 4, dtype=torch.float32).requires_grad_()
    loss = info_nce(
        anchors, torch.arange(num_anchors), contrast, torch.arange(num_contrast), temperature=0.1
    )
    values = with_gradients(loss, anchors, contrast)
    expected = [torch.zeros(()), torch.zeros(num_anchors, 4), torch.zeros(num_contrast, 4)]
    assert all(map(torch.equal, values, expected))


def test_only_unfilled_slots_give_a_connected_zero() -> None:
    anchors, bank = unit(3, 4).requires_grad_(), unit(5, 4).requires_grad_()
    loss = info_nce(anchors, torch.tensor([0, 0, 1]), bank, torch.full((5,), -1))
    values = with_gradients(loss, anchors, bank)
    assert all(not value.any() for value in values)


def test_an_unknown_anchor_matches_no_unfilled_slot() -> None:
    anchors, bank = unit(2, 4), unit(3, 4)
    bank_labels = torch.tensor([1, 0, -1])
    known_only = info_nce(anchors[:1], torch.tensor([1]), bank, bank_labels)
    with_unknown = info_nce(anchors, torch.tensor([1, -1]), bank, bank_labels)
    torch.testing.assert_close(with_unknown, known_only)


def test_empty_anchors_count_only_on_request() -> None:
    anchors, contrast = unit(4, 8), unit(3, 8)
    labels, contrast_labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 2])
    excluded = info_nce(anchors, labels, contrast, contrast_labels)
    included = info_nce(anchors, labels, contrast, contrast_labels, count_empty_anchors=True)
    # Class 1, half of the anchors, is missing in the contrast set.
    torch.testing.assert_close(excluded, 2 * included)
    alone = info_nce(anchors[:2], labels[:2], contrast, contrast_labels)
    torch.testing.assert_close(excluded, alone)


def test_another_positive_leaves_the_other_pairs_alone() -> None:
    anchors, negatives = unit(1, 8), unit(5, 8)
    positives = unit(2, 8)

    def loss(*chosen: Tensor) -> Tensor:
        contrast = torch.cat([*chosen, negatives])
        contrast_labels = torch.tensor([0] * len(chosen) + [1] * 5)
        return info_nce(anchors, torch.tensor([0]), contrast, contrast_labels)

    first, second = positives[:1], positives[1:]
    torch.testing.assert_close(loss(first, second), (loss(first) + loss(second)) / 2)


# ---- invariances


def test_order_of_anchors_does_not_matter() -> None:
    labels = torch.randint(5, (60,))
    anchors = unit(60, 16).requires_grad_()
    order = torch.randperm(60)
    (plain, plain_grad) = with_gradients(info_nce(anchors, labels), anchors)
    (shuffled, shuffled_grad) = with_gradients(info_nce(anchors[order], labels[order]), anchors)
    torch.testing.assert_close(shuffled, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(shuffled_grad, plain_grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 60])
def test_size_of_blocks_does_not_matter(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = torch.randint(5, (60,))
    anchors, bank = unit(60, 16, dtype=dtype).requires_grad_(), unit(31, 16, dtype=dtype)
    contrast_labels = torch.cat([labels, torch.randint(-1, 5, (31,))])

    def run() -> list[Tensor]:
        loss = info_nce(
            anchors,
            labels,
            torch.cat([anchors, bank]),
            contrast_labels,
            anchors_lead_contrast=True,
        )
        return with_gradients(loss, anchors)

    whole = run()
    set_blocks(monkeypatch, rows, num_contrast=91)
    for found, expected in zip(run(), whole, strict=True):
        assert largest_error(found, expected) <= rounding(16, 0.1, dtype)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_error_is_that_of_rounding(dtype: torch.dtype, temperature: float) -> None:
    labels = torch.randint(6, (300,))
    anchors = unit(300, 64, dtype=dtype).requires_grad_()
    exact_input = anchors.detach().double().requires_grad_()
    exact = with_gradients(references.dense_loss(exact_input, labels, temperature), exact_input)
    ours = with_gradients(info_nce(anchors, labels, temperature=temperature), anchors)
    for ours_one, exact_one in zip(ours, exact, strict=True):
        # Computed in fp32, whatever the input is, and then rounded once.
        once = torch.finfo(ours_one.dtype).eps / 2
        assert largest_error(ours_one, exact_one) <= rounding(64, temperature) + once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_temperature_stays_finite(dtype: torch.dtype) -> None:
    labels = torch.randint(4, (40,))
    # Opposite and equal vectors: similarities of -100 and 100.
    signs = torch.where(torch.rand(40, 1) < 0.5, -1.0, 1.0)
    embeddings = (signs * unit(1, 16, dtype=torch.float32)).to(dtype).requires_grad_()
    loss, gradient = with_gradients(info_nce(embeddings, labels, temperature=0.01), embeddings)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    expected = references.within_loss(embeddings.detach().double(), labels.tolist(), 0.01)
    assert largest_error(loss, expected) <= rounding(16, 0.01)
    assert expected > 50  # so that a missing maximum subtraction would have overflowed
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    labels = torch.randint(4, (50,))
    embeddings = unit(50, 32, dtype=dtype).requires_grad_()
    plain = with_gradients(info_nce(embeddings, labels), embeddings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(embeddings, labels)
    assert loss.dtype == torch.float32
    assert all(map(torch.equal, with_gradients(loss, embeddings), plain))


# ---- memory and autograd


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_memory_grows_with_the_anchors_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, width, rows = 1000, 8, 16
    set_blocks(monkeypatch, rows, num_contrast=size)
    monkeypatch.setattr(sorted_kernel, "_COLUMNS", size)
    monkeypatch.setattr(sorted_kernel, "_CACHE_BYTES", 0)
    labels = torch.randint(5, (size,))
    anchors = unit(size, width, dtype=torch.float32).requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with _LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = info_nce(anchors, labels)
        loss.backward()
    assert rows * size <= largest.numel <= 2 * rows * size
    assert 0 < sum(saved) <= 4 * size * width


def test_second_derivative_is_refused() -> None:
    anchors = unit(6, 4).requires_grad_()
    loss = info_nce(anchors, torch.tensor([0, 0, 1, 1, 2, 2]))
    with pytest.raises(RuntimeError, match="info_nce cannot be differentiated twice"):
        # Alone it would end in an error of autograd's; in a sum the part would go missing unseen.
        (gradient,) = torch.autograd.grad(loss + anchors.pow(3).sum(), anchors, create_graph=True)
        gradient.sum().backward()


# ---- errors


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_temperature_has_to_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature}.*above 0"):
        info_nce(unit(2, 3), torch.zeros(2, dtype=torch.long), temperature=temperature)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors": unit(2, 3, 4)}, r"anchors.*\(2, 3, 4\)"),
        ({"labels": torch.zeros(3)}, r"anchors.*\(2, 4\) and \(3,\)"),
        ({"contrast": unit(5, 4)}, "contrast_labels"),
        ({"contrast_labels": torch.zeros(5)}, "contrast_labels"),
        ({"anchors_lead_contrast": True}, "anchors_lead_contrast"),
        (
            {"contrast": unit(5, 4), "contrast_labels": torch.zeros(4)},
            r"contrast: expected.*\(5, 4\) and \(4,\)",
        ),
        (
            {"contrast": unit(5, 3), "contrast_labels": torch.zeros(5)},
            "4 wide and contrast samples 3.*embed_dim",
        ),
        (
            {
                "contrast": unit(1, 4),
                "contrast_labels": torch.zeros(1),
                "anchors_lead_contrast": True,
            },
            "1 contrast samples cannot begin with 2 anchors",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    defaults = {"anchors": unit(2, 4), "labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        info_nce(**{**defaults, **arguments})
