"""The Triton kernels against the equations, compiled where there is a GPU, else interpreted.

Triton decides when it is imported whether it interprets. Without a GPU the tests of the kernels
therefore run in a process of their own, which `test_with_the_interpreter` starts.

Shape letters: A anchors, C contrast samples, D embedding width.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import info_nce, info_nce_triton
from contrast_d2.contrast.info_nce_triton import is_available, triton_info_nce
from contrast_d2.contrast.sets import KernelResult, PixelSet

from . import references
from .rounding import largest_error, rounding

pytestmark = [
    # The kernels compute all pairs and then choose: what overflows is never chosen.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_KERNELS = is_available(torch.zeros(1, 1, device=DEVICE))

kernel_test = pytest.mark.skipif(
    not RUNS_KERNELS, reason="no GPU for Triton: test_with_the_interpreter runs this elsewhere"
)

# Class 3 has one anchor (no positive); class 0 is a class like any other.
LABELS = [0, 2, 0, 1, 1, 2, 0, 3, 1, 0]
# Class 1 is absent, class 4 has no anchor, and the negative ones are unfilled slots.
CONTRAST_LABELS = [2, -1, 0, 0, 4, 2, 3, -1]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few samples: the interpreter takes 10 ms for each pair of blocks."""
    if INTERPRETED:
        set_blocks(monkeypatch, rows=32, columns=64)


def set_blocks(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """Fixes the samples in a block; of wide ones 32 elements are multiplied at a time."""
    monkeypatch.setattr(
        info_nce_triton,
        "_choose_blocks",
        lambda width, *_, **__: info_nce_triton._Blocks(rows, columns, min(width, 32), 4, 1),
    )


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).float()


def textbook(
    anchors: Tensor,
    labels: Tensor,
    contrast: Tensor,
    contrast_labels: Tensor,
    temperature: float,
    exclude_self: bool,
) -> tuple[Tensor, Tensor]:
    """Total and number of valid anchors with masks over all pairs, in the dtype of the inputs."""
    logits = anchors @ contrast.T / temperature
    known = (labels >= 0)[:, None] & (contrast_labels >= 0)
    same = labels[:, None] == contrast_labels
    positive = same & known
    if exclude_self:
        positive = positive.clone().fill_diagonal_(False)
    negatives = logits.masked_fill(~known | same, -torch.inf).logsumexp(dim=1, keepdim=True)
    pairs = F.softplus(negatives - logits).masked_fill(~positive, 0)
    number = positive.sum(dim=1)
    return (pairs.sum(dim=1) / number.clamp(min=1)).sum(), (number > 0).sum()


class Sets:
    """Anchors, and what they are contrasted with in one of the three forms."""

    def __init__(self, form: str, A: int, D: int, *, order: str = "sorted", C: int = 45) -> None:
        self.anchors, self.labels = unit(A, D), torch.randint(-1, 6, (A,))
        if order == "sorted":
            self.labels = self.labels.sort().values
        self.contrast = self.contrast_labels = None
        self.lead = form == "bank"
        if form != "within":
            self.contrast, self.contrast_labels = unit(C, D), torch.randint(-1, 7, (C,))
        if form == "bank":
            self.contrast = torch.cat([self.anchors, self.contrast])
            self.contrast_labels = torch.cat([self.labels, self.contrast_labels])

    def run(
        self, temperature: float, needs_gradient: tuple[bool, bool] = (True, True)
    ) -> KernelResult:
        """The kernels' result, on the CPU."""
        contrast = None
        if self.contrast is not None:
            contrast = PixelSet(self.contrast.to(DEVICE), self.contrast_labels.to(DEVICE))
        result = triton_info_nce(
            PixelSet(self.anchors.to(DEVICE), self.labels.to(DEVICE)),
            contrast,
            temperature=temperature,
            holds_anchors=self.lead,
            needs_gradient=needs_gradient,
        )
        return KernelResult(*(None if value is None else value.cpu() for value in result))

    def expected(self, temperature: float, dtype: torch.dtype = torch.float64) -> KernelResult:
        """The textbook's, in a dtype; the anchors that lead count as samples of their own."""
        anchors = self.anchors.to(dtype).requires_grad_()
        if self.contrast is None:
            total, valid = textbook(anchors, self.labels, anchors, self.labels, temperature, True)
            return KernelResult(total.detach(), valid, *torch.autograd.grad(total, anchors), None)
        contrast = self.contrast.to(dtype).requires_grad_()
        total, valid = textbook(
            anchors, self.labels, contrast, self.contrast_labels, temperature, self.lead
        )
        return KernelResult(total.detach(), valid, *torch.autograd.grad(total, (anchors, contrast)))


def assert_results_close(actual: KernelResult, expected: KernelResult, tolerance: float) -> None:
    """Compares sums and gradients; the tolerance is relative to the largest element of each."""
    assert actual.num_valid.item() == expected.num_valid.item()
    for name in ("total", "d_anchors", "d_contrast"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if other is not None:
            assert one.dtype == torch.float32
            assert one.isfinite().all()
            assert largest_error(one, other.double()) <= tolerance, name


# ---- without a GPU


@pytest.mark.slow
def test_with_the_interpreter() -> None:
    if info_nce_triton.triton is None:
        pytest.skip("needs Triton, which PyTorch brings with its wheels for CUDA")
    if RUNS_KERNELS:
        pytest.skip("the kernels run in this process")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) >= 30, result.stdout


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_that_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter forgives what a compiler rejects, and knows no limits.
    pytest.importorskip("triton", "3.4", reason="compiles through Triton's internal interface")
    if INTERPRETED:
        pytest.skip("what is interpreted cannot be compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for capability, precision in [(80, "tf32x3"), (90, "tf32")]:
        for kernel in ("_negatives_kernel", "_positives_kernel", "_gradient_kernel"):
            assert 0 < shared_memory(kernel, capability, precision) <= 99 * 1024


def shared_memory(name: str, capability: int, precision: str) -> int:
    """Bytes of shared memory that a kernel takes on a GPU, at D = 256."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(info_nce_triton, name)
    blocks = info_nce_triton._choose_blocks(256, gradient=name == "_gradient_kernel")
    constants = {
        "D": 256,
        "WIDTH": 256,
        "BLOCK_R": blocks.rows,
        "BLOCK_Q": blocks.columns,
        "BLOCK_D": blocks.width,
        "PRECISION": precision,
        "EXCLUDE_SELF": True,
        "ROWS_ARE_ANCHORS": True,
        "COLUMNS_ARE_ANCHORS": True,
    }
    types = {"scale": "fp32"}
    signature, values, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name.endswith("pointer"):
            signature[name] = types.get(name, "*i32" if "label" in name else "*fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = types.get(name, "i32")
    compiled = compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    return compiled.metadata.shared


def test_without_triton_nothing_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    spec = importlib.util.spec_from_file_location(
        "contrast_d2.contrast.without_triton", info_nce_triton.__file__
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.is_available(torch.zeros(2, 3, device=DEVICE))


def test_a_cpu_needs_the_interpreter() -> None:
    if info_nce_triton.triton is None:
        pytest.skip("needs Triton")
    assert is_available(torch.zeros(2, 3)) == INTERPRETED


@kernel_test
def test_what_the_kernels_cannot_take_is_not_available() -> None:
    assert is_available(torch.zeros(0, 1024, device=DEVICE))
    assert not is_available(torch.zeros(2, 1025, device=DEVICE))
    assert not is_available(torch.zeros(2, 3, device=DEVICE, dtype=torch.float64))


# ---- the equations


@kernel_test
@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("form", ["within", "cross", "bank"])
def test_small_sets_equal_the_equations(form: str, temperature: float) -> None:
    sets = Sets(form, len(LABELS), 4, C=len(CONTRAST_LABELS))
    sets.labels = torch.tensor(LABELS)
    anchors = sets.anchors.double().requires_grad_()
    if form == "within":
        expected = references.within_loss(anchors, LABELS, temperature)
        gradients = (*torch.autograd.grad(expected, anchors), None)
    else:
        contrast_labels = LABELS + CONTRAST_LABELS if form == "bank" else CONTRAST_LABELS
        sets.contrast_labels = torch.tensor(contrast_labels)
        contrast = sets.contrast.double().requires_grad_()
        expected = references.cross_loss(
            anchors, LABELS, contrast, contrast_labels, temperature, lead=sets.lead
        )
        gradients = torch.autograd.grad(expected, (anchors, contrast))
    # Class 3 has a positive in the contrast sets, class 1 has none in the smaller one.
    valid = {"within": 9, "cross": 7, "bank": 10}[form]
    expected_sums = KernelResult(
        expected.detach() * valid,
        torch.tensor(valid),
        *(None if gradient is None else gradient * valid for gradient in gradients),
    )
    assert_results_close(sets.run(temperature), expected_sums, rounding(4, temperature))


# ---- precision


def assert_error_of_rounding(sets: Sets, temperature: float) -> None:
    tolerance = rounding(sets.anchors.shape[1], temperature)
    assert_results_close(sets.run(temperature), sets.expected(temperature), tolerance)


@kernel_test
@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.01])
@pytest.mark.parametrize("form", ["within", "cross", "bank"])
def test_the_error_is_that_of_rounding(form: str, temperature: float, order: str) -> None:
    assert_error_of_rounding(Sets(form, 40, 16, order=order, C=40), temperature)


@kernel_test
@pytest.mark.parametrize("width", [1, 3, 48, 256])
@pytest.mark.parametrize("form", ["within", "bank"])
def test_any_width(form: str, width: int) -> None:
    assert_error_of_rounding(Sets(form, 40, width, C=20), 0.1)


@kernel_test
@pytest.mark.parametrize("A", [1, 2, 64, 65])
def test_blocks_with_one_sample_and_full_ones(A: int) -> None:
    sets = Sets("within", A, 16)
    sets.labels[-1] = sets.labels[0] = 0  # a positive of the first stands last, alone in its block
    assert_error_of_rounding(sets, 0.1)


@kernel_test
def test_blocks_of_the_usual_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert_error_of_rounding(Sets("bank", 130, 48, C=20), 0.1)


@kernel_test
def test_products_follow_the_setting_of_pytorch() -> None:
    precision = torch.get_float32_matmul_precision()
    sets = Sets("bank", 40, 48)
    expected = sets.expected(0.1)
    try:
        for setting, ours in [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")]:
            torch.set_float32_matmul_precision(setting)
            assert info_nce_triton._input_precision() == ours
        # TF32 has 10 bits behind the point; the interpreter multiplies in fp32 all the same.
        assert_results_close(sets.run(0.1), expected, rounding(48, 0.1) if INTERPRETED else 5e-3)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert_results_close(sets.run(0.1), expected, rounding(48, 0.1))


@kernel_test
def test_opposite_and_equal_vectors_at_a_low_temperature() -> None:
    # Similarities of -100 and 100: without the running maximum e^s leaves the range of fp32.
    sets = Sets("within", 40, 16)
    signs = torch.where(torch.rand(40, 1) < 0.5, -1.0, 1.0)
    sets.anchors = signs * unit(1, 16)
    expected = sets.expected(0.01)
    assert expected.total > 50 * expected.num_valid
    assert_results_close(sets.run(0.01), expected, rounding(16, 0.01))


@kernel_test
def test_the_loss_of_separated_classes_keeps_its_digits() -> None:
    # Gaps of -17: 1 + e^gap is 1 in fp32, and its logarithm would be 0.
    sets = Sets("within", 40, 16)
    sets.labels = torch.arange(40) // 20
    sets.anchors = (1.0 - 2 * sets.labels[:, None]) * unit(1, 16)
    expected = sets.expected(0.1)
    assert 0 < expected.total < 1e-5
    assert_results_close(sets.run(0.1), expected, rounding(16, 0.1))


# ---- how the work is cut


@kernel_test
@pytest.mark.parametrize("programs", [1, 9, 1000])
def test_shares_of_the_columns_do_not_matter(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 9 programs for 3 blocks of anchors make 3 shares of 2; of 4 blocks of columns, one has none.
    set_blocks(monkeypatch, rows=16, columns=16)
    monkeypatch.setattr(info_nce_triton, "_PROGRAMS_PER_PROCESSOR", programs)
    assert_error_of_rounding(Sets("bank", 40, 16, C=20), 0.1)


@kernel_test
def test_blocks_that_are_skipped_held_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sorted, the blocks hold one class each; shuffled, each may hold all three.
    set_blocks(monkeypatch, rows=16, columns=16)
    visits = []
    if INTERPRETED:  # a compiled kernel cannot be watched
        softplus = info_nce_triton._softplus
        monkeypatch.setattr(info_nce_triton, "_softplus", lambda x: visits.append(x) or softplus(x))
    sets = Sets("within", 48, 16)
    sets.labels = torch.arange(48) // 16
    in_order = sets.run(0.1)
    assert len(visits) == (3 if INTERPRETED else 0)
    order = torch.randperm(48)
    sets.anchors, sets.labels = sets.anchors[order], sets.labels[order]
    shuffled = sets.run(0.1)
    assert len(visits) == (3 + 9 if INTERPRETED else 0)
    in_order = in_order._replace(d_anchors=in_order.d_anchors[order])
    assert_results_close(shuffled, in_order, rounding(16, 0.1))
    assert_results_close(shuffled, sets.expected(0.1), rounding(16, 0.1))


@kernel_test
def test_rows_need_not_be_contiguous() -> None:
    sets = Sets("within", 40, 16)
    expected = sets.run(0.1)
    sets.anchors = sets.anchors.T.contiguous().T
    assert all(map(torch.equal, sets.run(0.1)[:3], expected[:3]))


# ---- edges


@kernel_test
@pytest.mark.parametrize("form", ["within", "cross", "bank"])
def test_padding_is_as_if_it_were_not_there(form: str) -> None:
    sets = Sets(form, 50, 16, order="unsorted")
    kept = sets.labels >= 0
    assert 0 < (~kept).sum()
    whole = sets.run(0.1)
    assert not whole.d_anchors[~kept].any()
    sets.anchors, sets.labels = sets.anchors[kept], sets.labels[kept]
    d_anchors, d_contrast = whole.d_anchors[kept], whole.d_contrast
    if form != "within":
        known = sets.contrast_labels >= 0
        assert 0 < (~known).sum()
        assert not whole.d_contrast[~known].any()
        sets.contrast, sets.contrast_labels = sets.contrast[known], sets.contrast_labels[known]
        d_contrast = whole.d_contrast[known]
    whole = whole._replace(d_anchors=d_anchors, d_contrast=d_contrast)
    assert_results_close(sets.run(0.1), whole, rounding(16, 0.1))


@kernel_test
@pytest.mark.parametrize("form", ["within", "cross"])
@pytest.mark.parametrize(
    ("label", "num_valid"), [(0, 20), (-1, 0)], ids=["one class", "only padding"]
)
def test_no_negative_gives_exactly_zero(form: str, label: int, num_valid: int) -> None:
    sets = Sets(form, 20, 16)
    sets.labels = torch.full((20,), label)
    if form == "cross":
        sets.contrast_labels = torch.full((45,), label)
    result = sets.run(0.1)
    assert result.num_valid.item() == num_valid
    assert not any(value.any() for value in (result.total, *result[2:]) if value is not None)


@kernel_test
def test_no_positive_gives_exactly_zero() -> None:
    sets = Sets("within", 20, 16)
    sets.labels = torch.arange(20)
    result = sets.run(0.1)
    assert all(not value.any() for value in result[:3])


@kernel_test
@pytest.mark.parametrize(("A", "C"), [(0, 0), (0, 3), (3, 0)])
def test_empty_sets(A: int, C: int) -> None:
    sets = Sets("cross", A, 4, C=C)
    result = sets.run(0.1)
    expected = [torch.zeros(()), torch.zeros(()), torch.zeros(A, 4), torch.zeros(C, 4)]
    assert all(map(torch.equal, result, expected))


@kernel_test
@pytest.mark.parametrize("needs_gradient", [(False, False), (True, False), (False, True)])
def test_gradients_are_made_on_request(needs_gradient: tuple[bool, bool]) -> None:
    sets = Sets("cross", 20, 16)
    both = sets.run(0.1)
    result = sets.run(0.1, needs_gradient)
    assert torch.equal(result.total, both.total)
    for needed, one, other in zip(needs_gradient, result[2:], both[2:], strict=True):
        assert torch.equal(one, other) if needed else one is None


# ---- sizes of a real step


@pytest.mark.gpu
@kernel_test
def test_ten_thousand_anchors() -> None:
    anchors = unit(10_000, 256).to(DEVICE)
    labels = torch.randint(19, (10_000,), device=DEVICE).sort().values
    exact_anchors = anchors.double().requires_grad_()
    exact = info_nce(exact_anchors, labels, temperature=0.1)  # float64 stays with PyTorch
    (exact_gradient,) = torch.autograd.grad(exact, exact_anchors)

    def run(size: int) -> KernelResult:
        return triton_info_nce(
            PixelSet(anchors[:size], labels[:size]),
            None,
            temperature=0.1,
            holds_anchors=False,
            needs_gradient=(True, False),
        )

    def peak(size: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(size)
        return torch.cuda.max_memory_allocated() - before

    result = run(10_000)
    assert largest_error(result.total / 10_000, exact.detach()) <= rounding(256, 0.1)
    assert largest_error(result.d_anchors / 10_000, exact_gradient) <= rounding(256, 0.1)
    assert all(map(torch.equal, run(10_000)[:3], result[:3]))
    # One A x A matrix of fp32 would take 381 MiB.
    assert peak(10_000) < 100 * 2**20
    assert peak(10_000) < 2.5 * peak(5_000)
