"""What the compiler makes of the Triton kernels, for GPUs that are not here.

The interpreter forgives what a compiler rejects, and knows no limits.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast.kernels import gather, grouped
from contrast_d2.contrast.kernels.grouped import Variant, variants
from contrast_d2.contrast.sets import PixelDraw, PixelSet
from contrast_d2.contrast.terms import Side, Term

triton = pytest.importorskip("triton", "3.4", reason="compiles through Triton's internal interface")

# ruff: noqa: E402
from bench.compiled import Compiled, compile_kernel, compile_variant, gather_variants, name_of

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted cannot be compiled"
)

# Bytes of shared memory that a program may take: on GPUs of data centres; and on others with the
# shapes that all generations but 9 and 10 share.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
PRODUCTS = {80: r"\bHMMA\.16816", 90: r"\bHGMMA\.", 100: r"\bUTC\w*MMA"}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing that was compiled before is taken."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("triton")
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


def check_limits(found: Compiled, capability: int) -> None:
    """No register is spilled, and the memory suffices."""
    assert found.shared <= SHARED[capability]
    if not found.sass:
        pytest.skip(
            "Triton was installed without NVIDIA's disassembler: only its limits are checked"
        )
    assert found.stack == 0
    assert 0 < found.registers <= 255
    assert found.spills == 0


def check(variant: Variant, capability: int) -> None:
    """As `check_limits`, and no instruction has got lost."""
    found = compile_variant(variant, capability)
    check_limits(found, capability)
    if variant.shape is None:
        return
    assert found.count(PRODUCTS[capability]) > 0
    # An assembler was seen to drop products, and exponentials with them.
    exponentials = len(re.findall(r"\bex2\.", found.ptx))
    assert found.count(r"MUFU\.EX2") == exponentials >= 8
    if capability == 90:
        assert tiles(found) == expected_tiles(variant)
        assert found.count(r"\bHMMA\.") == 0


def tiles(found: Compiled) -> set[tuple[int, int]]:
    """Rows and columns of the products that a warpgroup computes."""
    return {(int(m), int(n)) for m, n in re.findall(r"HGMMA\.(\d+)x(\d+)x16", found.sass)}


def expected_tiles(variant: Variant) -> set[tuple[int, int]]:
    assert variant.shape is not None
    similarities = (64, variant.shape.columns)
    if variant.kernel != "gradient":
        return {similarities}
    return {similarities, (64, variant.shape.out)}


# The widest default, and the kernel that has the fewest registers to spare.
@pytest.mark.parametrize("split", [False, True], ids=["single", "split"])
def test_the_gradient_of_the_usual_width_on_hopper(split: bool) -> None:
    for shape in grouped.shapes("gradient", 256, split, (9, 0)):
        check(Variant("gradient", 256, split, shape), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_variant(capability: int, subtests: pytest.Subtests) -> None:
    everything = variants(divmod(capability, 10))
    assert len({variant.kernel for variant in everything}) == 6
    for variant in everything:
        with subtests.test(name_of(variant)):
            check(variant, capability)


class Hopper:
    """In place of Triton's driver: a GPU that is not here, on which nothing is launched."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are tested as such")
def test_a_launch_finds_what_was_compiled(
    monkeypatch: pytest.MonkeyPatch, _cache: Path, subtests: pytest.Subtests
) -> None:
    """The arguments of a real step are those that the tests above compile for."""
    launched = []

    def launch(kernel: Any, grid: tuple[int, ...], table: Tensor, *rest: Any, **given: Any) -> None:
        name = kernel.fn.__name__
        launched.append(name)
        constants = {x: given[x] for x in given if x in kernel.arg_names}
        options = {x: given[x] for x in given if x not in constants}
        compile_kernel(kernel, constants, 90, options)
        before = set(_cache.iterdir())
        kernel.warmup(table, *rest, grid=grid, **given)
        with subtests.test(name):
            assert set(_cache.iterdir()) == before

    for module in (gather, grouped):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(gather, "is_usable", lambda *_: True)
    rows = F.normalize(torch.randn(70, 64), dim=1).requires_grad_()
    anchors = PixelSet(rows, torch.arange(70) // 20)
    term = Term("a", anchors, [Side(anchors)], 0.1)
    maps = torch.randn(1, 8, 4, 4, requires_grad=True)
    first = torch.arange(3)
    draw = PixelDraw(torch.zeros_like(first), first, first, None)
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    ((total, _),) = grouped.grouped_info_nce([term], [term.contrast])
    torch.autograd.grad(total, rows, torch.ones(()))
    (drawn,) = gather.gather_draws([maps], [[draw]], normalize=True)
    drawn.sum().backward()
    assert len(launched) == 8


# Of every dtype; the slow test has the rest.
@pytest.mark.parametrize(
    "kernel", ["read_rows-0-True", "read_rows-1-False", "write_rows-2-True-True"]
)
def test_reading_and_writing_pixels_on_hopper(kernel: str) -> None:
    check_limits(compile_kernel(*gather_variants()[kernel], 90), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_reading_and_writing_pixels(capability: int, subtests: pytest.Subtests) -> None:
    everything = gather_variants()
    assert len(everything) == 3 * 2 * 3
    for name, (kernel, constants) in everything.items():
        with subtests.test(name):
            check_limits(compile_kernel(kernel, constants, capability), capability)
