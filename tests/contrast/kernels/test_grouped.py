"""The grouped InfoNCE against the equations, compiled where there is a GPU, else interpreted.

Triton decides when it is imported whether it interprets. Without a GPU the tests of the kernels
therefore run in a process of their own, which `test_with_the_interpreter` starts.

Shape letters: A anchors, C contrast samples, D embedding width, N rows of a set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import evaluate, info_nce, ms_cs
from contrast_d2.contrast.kernels import gather, grouped, triton_tools
from contrast_d2.contrast.kernels.grouped import grouped_info_nce, is_available, shapes
from contrast_d2.contrast.sets import PixelSet
from contrast_d2.contrast.terms import Side, Term

from .. import references
from ..rounding import largest_error, rounding

pytestmark = [
    # The kernels compute all pairs and then choose; what overflows is never chosen.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_KERNELS = is_available(torch.zeros(1, 1, device=DEVICE), 0.1)

kernel_test = pytest.mark.skipif(
    not RUNS_KERNELS, reason="no GPU for Triton: test_with_the_interpreter runs this elsewhere"
)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).float()


def pixels(N: int, D: int, *, order: str = "unsorted", classes: int = 5) -> PixelSet:
    """A set with rows that are none, which gets a gradient."""
    labels = torch.randint(-1, classes, (N,))
    if order == "sorted":
        labels = labels.sort().values
    return PixelSet(unit(N, D).to(DEVICE).requires_grad_(), labels.to(DEVICE))


def textbook(term: Term, sides: Sequence[Side], rows: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Total and number of valid anchors with masks over all pairs, in float64."""
    anchors, labels = rows[id(term.anchors.embeddings)], term.anchors.labels
    logits, positive, negative = [], [], []
    for number, side in enumerate(sides):
        others = side.set.labels
        logits.append(anchors @ rows[id(side.set.embeddings)].T / term.temperature)
        known = (labels >= 0)[:, None] & (others >= 0)
        same = labels[:, None] == others
        if number == 0 and term.holds_anchors:
            own = torch.eye(*same.shape, dtype=torch.bool, device=same.device)
            positive.append(same & known & ~own)
        else:
            positive.append(same & known)
        negative.append(~same & known)
        if side.role != "both":
            (positive if side.role == "negatives" else negative)[-1].fill_(False)
    logits, positive, negative = (torch.cat(parts, 1) for parts in (logits, positive, negative))
    lse = logits.masked_fill(~negative, -torch.inf).logsumexp(dim=1, keepdim=True)
    losses = F.softplus(lse - logits, threshold=40).masked_fill(~positive, 0)
    number = positive.sum(dim=1)
    return (losses.sum(dim=1) / number.clamp(min=1)).sum(), (number > 0).sum()


class Found(NamedTuple):
    """Per term the total and the valid anchors; the gradients of all sets."""

    totals: list[Tensor]
    valid: list[float]
    gradients: list[Tensor]


def leaves(terms: Sequence[Term], sides: Sequence[Sequence[Side]]) -> dict[int, Tensor]:
    sets = [term.anchors for term in terms] + [side.set for part in sides for side in part]
    return {id(x.embeddings): x.embeddings for x in sets}


def run(
    terms: Sequence[Term],
    sides: Sequence[Sequence[Side]] | None = None,
    *,
    upstream: Sequence[float] = (),
    single: bool = False,
) -> Found:
    sides = [term.contrast for term in terms] if sides is None else sides
    inputs = [x for x in leaves(terms, sides).values() if x.requires_grad]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=single):
        sums = grouped_info_nce(terms, sides)
    totals = [total for total, _ in sums]
    gradients = torch.autograd.grad(
        totals,
        inputs,
        [x.new_tensor(y) for x, y in zip(totals, upstream or weights(terms), strict=True)],
    )
    valid = [number.item() for _, number in sums]
    return Found([total.detach() for total in totals], valid, list(gradients))


def weights(terms: Sequence[Term]) -> list[float]:
    """Upstream gradients that differ, also in sign."""
    return [(-1) ** i * (0.3 + i) for i in range(len(terms))]


def expected(terms: Sequence[Term], sides: Sequence[Sequence[Side]] | None = None) -> Found:
    sides = [term.contrast for term in terms] if sides is None else sides
    rows = leaves(terms, sides)
    exact = {key: x.detach().double().requires_grad_(x.requires_grad) for key, x in rows.items()}
    sums = [textbook(term, part, exact) for term, part in zip(terms, sides, strict=True)]
    total = sum(w * total for w, (total, _) in zip(weights(terms), sums, strict=True))
    inputs = [x for x in exact.values() if x.requires_grad]
    return Found(
        [total.detach() for total, _ in sums],
        [number.item() for _, number in sums],
        list(torch.autograd.grad(total, inputs)),
    )


def assert_close(found: Found, exact: Found, tolerance: float) -> None:
    """The tolerance is relative to each sum, and to the largest element of each gradient."""
    assert found.valid == exact.valid
    for one, other in zip(
        found.totals + found.gradients, exact.totals + exact.gradients, strict=True
    ):
        assert one.dtype == torch.float32
        assert one.isfinite().all()
        assert largest_error(one, other) <= tolerance


def tolerance(width: int, temperature: float, single: bool) -> float:
    """What rounding explains.

    A cosine of rows in fp16, whose unit roundoff is 2^-11, is off by twice that at most, so n - s
    by four times that over the temperature; see `rounding` for what follows from it.
    """
    return 4 * 2**-11 / temperature if single else rounding(width, temperature)


# ---- without a GPU


QUICK = (
    "small_sets or exactly_zero or in_place or changes_no_digit or two_widths or of_both_kinds "
    "or whole_step"
)


@pytest.mark.parametrize("chosen", [QUICK, pytest.param("", marks=pytest.mark.slow, id="all")])
def test_with_the_interpreter(chosen: str) -> None:
    if triton_tools.triton is None:
        pytest.skip("needs Triton, which PyTorch brings with its wheels for CUDA")
    if RUNS_KERNELS:
        pytest.skip("the kernels run in this process")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) >= 10, result.stdout


def test_without_triton_nothing_is_available() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from contrast_d2.contrast.kernels import gather, grouped, triton_tools;"
        "x = torch.zeros(2, 3); "
        "assert not triton_tools.is_usable(x) and not grouped.is_available(x, 0.1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_cpu_needs_the_interpreter() -> None:
    if triton_tools.triton is None:
        pytest.skip("needs Triton")
    assert is_available(torch.zeros(2, 3), 0.1) == INTERPRETED


@kernel_test
def test_what_the_kernels_cannot_take_is_not_available() -> None:
    assert is_available(torch.zeros(0, 512, device=DEVICE), 0.025)
    assert not is_available(torch.zeros(2, 512, device=DEVICE), 0.02)
    assert not is_available(torch.zeros(2, 513, device=DEVICE), 0.1)
    assert not is_available(torch.zeros(2, 3, device=DEVICE, dtype=torch.float64), 0.1)


# ---- the equations


@kernel_test
@pytest.mark.parametrize("form", ["within", "across", "lead"])
def test_small_sets_equal_the_equations(form: str) -> None:
    labels, other = [0, 2, 0, 1, 1, 2, 0, 3, 1, 0], [2, -1, 0, 0, 4, 2, 3, -1]
    anchors = unit(len(labels), 4).to(DEVICE).requires_grad_()
    exact = anchors.detach().double().requires_grad_()
    own = torch.tensor(labels, device=DEVICE)
    if form == "within":
        found = info_nce(anchors, own, temperature=0.1)
        wanted = references.within_loss(exact, labels, 0.1)
    else:
        contrast = unit(len(other), 4).to(DEVICE)
        if form == "lead":
            contrast, other = torch.cat([anchors.detach(), contrast]), labels + other
        found = info_nce(
            anchors,
            own,
            contrast,
            torch.tensor(other, device=DEVICE),
            temperature=0.1,
            anchors_lead_contrast=form == "lead",
        )
        lead = form == "lead"
        wanted = references.cross_loss(exact, labels, contrast.double(), other, 0.1, lead=lead)
    ones = [found, *torch.autograd.grad(found, anchors)]
    others = [wanted, *torch.autograd.grad(wanted, exact)]
    for one, by_hand in zip(ones, others, strict=True):
        assert largest_error(one.detach(), by_hand.detach()) <= rounding(4, 0.1)


def many_terms(D: int, order: str = "unsorted") -> list[Term]:
    """Terms of all kinds over sets of their own and of others, at several temperatures."""
    a, b = pixels(70, D, order=order), pixels(40, D, order=order)
    drawn = pixels(30, D)
    bank = PixelSet(unit(33, D).to(DEVICE), torch.randint(-1, 6, (33,), device=DEVICE))
    return [
        Term("within", a, [Side(a)], 0.1),
        Term("across", a, [Side(b)], 0.07),
        Term("back", b, [Side(a)], 0.07),
        Term("memory", b, [Side(b), Side(bank)], 0.5),
        Term("roles", a, [Side(a, "positives"), Side(drawn, "negatives")], 0.1),
    ]


@kernel_test
@pytest.mark.parametrize("single", [False, True], ids=["split", "single"])
@pytest.mark.parametrize("order", ["sorted", "unsorted"])
@pytest.mark.parametrize("width", [64, 100, 256])
def test_terms_of_all_kinds(width: int, order: str, single: bool) -> None:
    terms = many_terms(width, order)
    assert_close(run(terms, single=single), expected(terms), tolerance(width, 0.07, single))


@kernel_test
def test_terms_of_two_widths() -> None:
    a, b = pixels(40, 64), pixels(40, 70)
    terms = [Term("a", a, [Side(a)], 0.1), Term("b", b, [Side(b)], 0.1)]
    assert_close(run(terms), expected(terms), rounding(70, 0.1))


@kernel_test
def test_anchors_that_lead_a_set_of_all_processes() -> None:
    a, other = pixels(40, 64), pixels(50, 64)
    everything = PixelSet(
        torch.cat([a.embeddings, other.embeddings]).detach().requires_grad_(),
        torch.cat([a.labels, other.labels]),
    )
    terms, sides = [Term("a", a, [Side(a)], 0.1)], [[Side(everything)]]
    assert_close(run(terms, sides), expected(terms, sides), rounding(64, 0.1))


@kernel_test
@pytest.mark.parametrize("temperature", [0.025, 1.0])
def test_temperatures_at_both_ends(temperature: float) -> None:
    a = pixels(70, 64)
    terms = [Term("a", a, [Side(a)], temperature)]
    assert_close(run(terms), expected(terms), rounding(64, temperature))


@kernel_test
def test_opposite_and_equal_vectors_at_the_lowest_temperature() -> None:
    # Similarities of -40 and 40: sums of e^s from e^-80 to 1 on the kernels' scale.
    signs = torch.where(torch.rand(40, 1) < 0.5, -1.0, 1.0)
    labels = torch.randint(4, (40,), device=DEVICE)
    a = PixelSet((signs * unit(1, 64)).to(DEVICE).requires_grad_(), labels)
    terms = [Term("a", a, [Side(a)], 0.025)]
    exact = expected(terms)
    assert exact.totals[0] > 20 * exact.valid[0]
    assert_close(run(terms), exact, rounding(64, 0.025))


@kernel_test
def test_the_loss_of_separated_classes_keeps_its_digits() -> None:
    # Gaps of -17: 1 + e^gap is 1 in fp32, and its logarithm would be 0.
    labels = torch.arange(40, device=DEVICE) // 20
    rows = (1.0 - 2 * labels[:, None]) * unit(1, 64).to(DEVICE)
    a = PixelSet(rows.requires_grad_(), labels)
    terms = [Term("a", a, [Side(a)], 0.1)]
    exact = expected(terms)
    assert 0 < exact.totals[0] < 1e-5
    assert_close(run(terms), exact, rounding(64, 0.1))


# ---- a bank that is read where it lies


def bank_terms() -> tuple[list[Term], Tensor]:
    """Anchors against themselves and a bank in fp16, behind which nothing may be read."""
    a = pixels(40, 64)
    keys = torch.full((200, 64), torch.nan, dtype=torch.float16, device=DEVICE)
    keys[:77] = unit(77, 64).half()
    labels = torch.randint(-1, 6, (77,), device=DEVICE)  # rows that are none are not zero here
    bank = PixelSet(keys[:77], labels)
    return [Term("a", a, [Side(a), Side(bank)], 0.1)], keys


@kernel_test
@pytest.mark.parametrize("single", [False, True], ids=["split", "single"])
def test_a_bank_in_fp16_is_read_in_place(single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    real = grouped._Run
    monkeypatch.setattr(grouped, "_Run", lambda *args: runs.append(real(*args)) or runs[-1])
    terms, _ = bank_terms()
    assert_close(run(terms, single=single), expected(terms), tolerance(64, 0.1, single))
    assert runs[0].in_place == [False, True]


@kernel_test
def test_a_bank_must_not_change_before_the_backward_pass() -> None:
    terms, keys = bank_terms()
    ((total, _),) = grouped_info_nce(terms, [terms[0].contrast])
    keys[0] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_gets_a_gradient(dtype: torch.dtype) -> None:
    labels = torch.randint(4, (40,), device=DEVICE)
    a = PixelSet(unit(40, 64).to(DEVICE, dtype).requires_grad_(), labels)
    terms = [Term("a", a, [Side(a)], 0.1)]
    found, exact = run(terms), expected(terms)
    assert found.gradients[0].dtype == dtype
    assert largest_error(found.totals[0], exact.totals[0]) <= rounding(64, 0.1)
    assert largest_error(found.gradients[0], exact.gradients[0]) <= torch.finfo(dtype).eps


# ---- upstream gradients


@kernel_test
@pytest.mark.parametrize("single", [False, True], ids=["split", "single"])
def test_the_scale_of_the_loss_changes_no_digit(single: bool) -> None:
    terms = many_terms(64)[:2]
    one = run(terms, upstream=[0.5, 1.0], single=single)
    scaled = run(terms, upstream=[0.5 * 65536, 65536.0], single=single)
    for small, large in zip(one.gradients, scaled.gradients, strict=True):
        assert torch.equal(small * 65536, large)


@kernel_test
def test_no_upstream_gradient_gives_zeros_and_an_infinite_one_shows() -> None:
    terms = many_terms(64)[:1]
    assert not run(terms, upstream=[0.0]).gradients[0].any()
    assert not run(terms, upstream=[torch.inf]).gradients[0].isfinite().all()


@kernel_test
def test_losses_that_are_left_out_of_the_sum() -> None:
    terms = many_terms(64)[:2]
    totals = [total for total, _ in grouped_info_nce(terms, [term.contrast for term in terms])]
    (alone,) = torch.autograd.grad(totals[0], terms[0].anchors.embeddings)
    (exact,) = run(terms[:1], upstream=[1.0]).gradients
    assert largest_error(alone, exact.double()) <= rounding(64, 0.1)


@kernel_test
def test_it_cannot_be_differentiated_twice() -> None:
    terms = many_terms(64)[:1]
    ((total, _),) = grouped_info_nce(terms, [terms[0].contrast])
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(total, terms[0].anchors.embeddings, create_graph=True)


# ---- how the work is cut


@kernel_test
@pytest.mark.parametrize("programs", [1, 9, 1000])
def test_shares_of_the_work_do_not_matter(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_PROGRAMS_PER_PROCESSOR", programs)
    a, b = pixels(150, 64), pixels(90, 64)
    terms = [Term("a", a, [Side(a), Side(b)], 0.1), Term("b", b, [Side(a)], 0.2)]
    assert_close(run(terms), expected(terms), rounding(64, 0.1))


@kernel_test
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("single", [False, True], ids=["split", "single"])
@pytest.mark.parametrize("width", [64, 256, 512])
def test_every_shape(
    width: int, single: bool, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pixels(130, width), pixels(70, width)
    terms = [Term("a", a, [Side(a)], 0.1), Term("b", b, [Side(a)], 0.1)]
    exact = expected(terms)
    for index in (0, -1):  # for little and for much work
        monkeypatch.setattr(
            grouped, "shapes", lambda k, w, s, _, i=index: [shapes(k, w, s, capability)[i]]
        )
        assert_close(run(terms, single=single), exact, tolerance(width, 0.1, single))


@kernel_test
def test_equal_inputs_give_equal_results() -> None:
    terms = many_terms(64)
    one, other = run(terms), run(terms)
    assert all(map(torch.equal, one.totals + one.gradients, other.totals + other.gradients))


@kernel_test
def test_the_number_of_launches_does_not_depend_on_that_of_terms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = []
    real = grouped._Run._launch

    def launch(own: grouped._Run, table: Tensor, kernel: str, *rest: object) -> None:
        launched.append(kernel)
        real(own, table, kernel, *rest)

    monkeypatch.setattr(grouped._Run, "_launch", launch)
    terms = many_terms(64)
    run(terms)
    several = launched.copy()
    launched.clear()
    run(terms[:1])
    assert launched == several
    assert several == ["pack", "negatives", "positives", "coefficients", "gradient", "add_up"]


@kernel_test
def test_a_whole_step_launches_eight_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        triton_tools.launch(kernel, *arguments, **constants)

    for module in (gather, grouped):
        monkeypatch.setattr(module, "launch", launch)
    channels = {"res2": 8, "res3": 16, "res4": 24}
    method = ms_cs(channels, 5, embed_dim=64).to(DEVICE)
    maps = {
        name: torch.randn(2, c, 16 >> i, 16 >> i, device=DEVICE)
        for i, (name, c) in enumerate(channels.items())
    }
    labels = (torch.arange(32) // 7).expand(2, 32, 32)  # stripes
    losses = method(maps, labels).losses
    assert len(losses) == 5
    forward = ["_read_rows", "pack", "negatives", "positives", "coefficients"]
    assert launched == forward
    torch.stack(list(losses.values())).sum().backward()
    assert launched[5:] == ["gradient", "add_up", "_write_rows"]


@kernel_test
def test_rows_need_not_be_contiguous() -> None:
    terms = many_terms(64)[:1]
    a = terms[0].anchors
    rows = a.embeddings.detach().T.contiguous().T.requires_grad_()
    turned = a._replace(embeddings=rows, labels=a.labels.int())
    one, other = run(terms), run([Term("a", turned, [Side(turned)], 0.1)])
    assert torch.equal(one.totals[0], other.totals[0])
    assert torch.equal(one.gradients[0], other.gradients[0])


# ---- edges


@kernel_test
@pytest.mark.parametrize(
    ("labels", "valid"),
    [([0] * 20, 20), ([-1] * 20, 0), (list(range(20)), 0), ([], 0)],
    ids=["one class", "only padding", "no positive", "no rows"],
)
def test_without_pairs_all_is_exactly_zero(labels: list[int], valid: int) -> None:
    rows = unit(20, 64).to(DEVICE)[: len(labels)].requires_grad_()
    a = PixelSet(rows, torch.tensor(labels, dtype=torch.int64, device=DEVICE))
    found = run([Term("a", a, [Side(a)], 0.1)])
    assert found.valid == [valid]
    assert not found.totals[0]
    assert found.gradients[0].shape == rows.shape
    assert not found.gradients[0].any()


@kernel_test
@pytest.mark.parametrize(("A", "C"), [(0, 0), (0, 30), (30, 0)])
def test_empty_sets_beside_others(A: int, C: int) -> None:
    a, b, c = pixels(A, 64), pixels(C, 64), pixels(40, 64)
    terms = [Term("ab", a, [Side(b)], 0.1), Term("c", c, [Side(c)], 0.1)]
    found, exact = run(terms), expected(terms)
    assert not found.totals[0]
    of_a, of_c, of_b = found.gradients
    assert not of_a.any()
    assert not of_b.any()
    assert_close(
        Found(found.totals[1:], found.valid, [of_c]),
        Found(exact.totals[1:], exact.valid, [exact.gradients[1]]),
        rounding(64, 0.1),
    )


@kernel_test
def test_padding_is_as_if_it_were_not_there() -> None:
    a, b = pixels(70, 64), pixels(50, 64)
    whole = run([Term("a", a, [Side(a), Side(b)], 0.1)])
    kept = [x.labels >= 0 for x in (a, b)]
    a, b = (
        PixelSet(x.embeddings.detach()[k].requires_grad_(), x.labels[k])
        for x, k in zip((a, b), kept, strict=True)
    )
    rest = run([Term("a", a, [Side(a), Side(b)], 0.1)])
    for one, other, k in zip(whole.gradients, rest.gradients, kept, strict=True):
        assert 0 < (~k).sum()
        assert not one[~k].any()
        assert largest_error(one[k], other.double()) <= rounding(64, 0.1)
    assert largest_error(whole.totals[0], rest.totals[0].double()) <= rounding(64, 0.1)


@kernel_test
def test_gradients_are_made_on_request() -> None:
    a, b = pixels(40, 64), pixels(30, 64)
    terms = [Term("a", a, [Side(b)], 0.1)]
    both = run(terms)
    detached = b._replace(embeddings=b.embeddings.detach())
    alone = run([Term("a", a, [Side(detached)], 0.1)])
    assert torch.equal(alone.gradients[0], both.gradients[0])
    assert len(alone.gradients) == 1
    with torch.no_grad():
        ((total, _),) = grouped_info_nce(terms, [terms[0].contrast])
    assert torch.equal(total, both.totals[0])


@kernel_test
def test_evaluate_takes_terms_of_both_kinds() -> None:
    # At the second temperature e^-2/T leaves the range of fp32: the masked kernel's.
    a, b = pixels(40, 64), pixels(30, 64)
    terms = [Term("a", a, [Side(a)], 0.1, 2.0), Term("b", b, [Side(a)], 0.01)]
    losses = evaluate(terms, 5).losses
    exact = expected(terms)
    for term, total, valid in zip(terms, exact.totals, exact.valid, strict=True):
        found = losses[f"loss_contrast_{term.name}"].detach()
        wanted = term.weight * total / valid
        assert largest_error(found, wanted) <= rounding(64, term.temperature)


# ---- sizes of a real step


@pytest.mark.gpu
@kernel_test
@pytest.mark.skipif(INTERPRETED, reason="takes hours")
@pytest.mark.parametrize("single", [False, True], ids=["split", "single"])
def test_ten_thousand_anchors(single: bool) -> None:
    labels = torch.randint(19, (10_000,), device=DEVICE).sort().values
    a = PixelSet(unit(10_000, 256).to(DEVICE).requires_grad_(), labels)
    terms = [Term("a", a, [Side(a)], 0.1)]
    exact_rows = a.embeddings.detach().double().requires_grad_()
    exact = info_nce(exact_rows, labels, temperature=0.1)  # float64 stays with PyTorch
    (gradient,) = torch.autograd.grad(exact, exact_rows)

    def peak(size: int) -> int:
        part = PixelSet(a.embeddings.detach()[:size].requires_grad_(), labels[:size])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run([Term("a", part, [Side(part)], 0.1)], single=single)
        return torch.cuda.max_memory_allocated() - before

    torch.cuda.set_sync_debug_mode("error")
    try:
        ((total, _),) = grouped_info_nce(terms, [terms[0].contrast])
        torch.autograd.grad(total, a.embeddings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = run(terms, upstream=[1.0], single=single)
    bound = tolerance(256, 0.1, single)
    assert largest_error(found.totals[0] / 10_000, exact.detach()) <= bound
    assert largest_error(found.gradients[0] / 10_000, gradient) <= bound
    again = run(terms, upstream=[1.0], single=single)
    assert torch.equal(found.gradients[0], again.gradients[0])
    # One A x A matrix of fp32 would take 381 MiB.
    assert peak(10_000) < 200 * 2**20
