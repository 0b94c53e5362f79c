"""What the compiler makes of the Triton kernels, for GPUs that are not here.

The interpreter forgives what a compiler rejects, and knows no limits.
"""

from __future__ import annotations

import os
import re

import pytest

from contrast_d2.contrast.kernels import grouped
from contrast_d2.contrast.kernels.grouped import Variant, variants

pytest.importorskip("triton", "3.4", reason="compiles through Triton's internal interface")

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
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


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
