"""Reading pixels off maps, and their gradients.

The Triton kernels run compiled where there is a GPU, else interpreted: `test_with_the_interpreter`
starts a process for that, as Triton decides when it is imported.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import PixelDraw, gather_embeddings, gather_pixels
from contrast_d2.contrast.kernels import gather
from contrast_d2.contrast.kernels.gather import gather_draws
from contrast_d2.contrast.kernels.triton_tools import is_interpreted, is_usable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_KERNELS = is_usable(torch.zeros(1, device=DEVICE))
kernel_test = pytest.mark.skipif(
    not RUNS_KERNELS, reason="no GPU for Triton: test_with_the_interpreter runs this elsewhere"
)

SHAPE = (3, 5, 4, 6)
# In no order, with neighbours in memory, and the corners of the map.
IMAGE = torch.tensor([1, 0, 2, 1, 0, 2])
PIXEL = torch.tensor([11, 0, 23, 10, 23, 7])
# The first three again, as two draws may have them.
REPEATED = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])


def permuted_tokens(maps: Tensor) -> Tensor:
    """As transformers yield maps: (B, h * w, C) tokens seen as a map."""
    tokens = maps.flatten(2).transpose(1, 2).contiguous()
    return tokens.transpose(1, 2).unflatten(2, maps.shape[2:])


def slice_of_a_map(maps: Tensor) -> Tensor:
    return F.pad(maps, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]


def part_of_channels(maps: Tensor) -> Tensor:
    joined = torch.cat([maps, maps], dim=1).contiguous(memory_format=torch.channels_last)
    return joined[:, : maps.shape[1]]


# And what the gradient's memory format is.
LAYOUTS = [
    (Tensor.contiguous, torch.contiguous_format),
    (lambda maps: maps.contiguous(memory_format=torch.channels_last), torch.channels_last),
    (permuted_tokens, torch.channels_last),
    (slice_of_a_map, torch.contiguous_format),
    (part_of_channels, torch.channels_last),
]


def by_loop(maps: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    where = [divmod(p, maps.shape[3]) for p in pixel.tolist()]
    return torch.stack([maps[b, :, y, x] for b, (y, x) in zip(image.tolist(), where, strict=True)])


@pytest.mark.parametrize("group_bytes", [1, 300, 1 << 20])  # one plane at a time, some, all
def test_values_and_gradients_are_those_of_indexing(monkeypatch, group_bytes: int) -> None:
    monkeypatch.setattr(gather, "_GROUP_BYTES", group_bytes)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for (layout, memory_format), dtype, distinct in itertools.product(
        LAYOUTS, dtypes, (True, False)
    ):
        maps = layout(torch.randn(SHAPE).to(dtype)).requires_grad_()
        reference = maps.detach().clone().requires_grad_()
        rows = slice(None) if distinct else REPEATED
        image, pixel = IMAGE[rows], PIXEL[rows]
        found = gather_pixels(maps, image, pixel, distinct=distinct)
        expected = by_loop(reference, image, pixel)
        assert found.dtype == dtype and torch.equal(found, expected)
        # Integers, so that sums of two are exact in every type.
        weight = torch.randint(1, 9, expected.shape).to(dtype)
        (gradient,) = torch.autograd.grad((found * weight).sum(), maps)
        (exact,) = torch.autograd.grad((expected * weight).sum(), reference)
        assert torch.equal(gradient, exact)
        assert gradient.is_contiguous(memory_format=memory_format)


def test_an_empty_draw_stays_connected() -> None:
    nothing = torch.empty(0, dtype=torch.long)
    for (layout, _), distinct in itertools.product(LAYOUTS, (True, False)):
        embeddings = layout(torch.randn(SHAPE)).requires_grad_()
        drawn = gather_embeddings(embeddings, nothing, nothing, distinct=distinct)
        assert drawn.shape == (0, 5)
        (gradient,) = torch.autograd.grad(drawn.sum(), embeddings)
        assert torch.equal(gradient, torch.zeros(SHAPE))


def test_the_gradient_is_the_only_map_that_is_made() -> None:
    for layout, _ in LAYOUTS[:2]:
        maps = layout(torch.randn(SHAPE)).requires_grad_()
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            drawn = gather_pixels(maps, IMAGE, PIXEL, distinct=True)
        assert [t.numel() for t in saved] == [len(IMAGE)] * 2
        with torch.profiler.profile(profile_memory=True) as profile:
            drawn.sum().backward()
        allocated = [e.nbytes() for e in profile.profiler.kineto_results.events()]
        assert sum(size >= maps.numel() * 4 for size in allocated) == 1


def test_second_derivative_is_refused() -> None:
    maps = torch.randn(SHAPE, requires_grad=True)
    drawn = gather_pixels(maps, IMAGE, PIXEL)
    with pytest.raises(RuntimeError, match="gather_pixels"):
        torch.autograd.grad(drawn.square().sum(), maps, create_graph=True)


def test_drawn_embeddings_are_unit_vectors() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        embeddings = (10 * torch.randn(SHAPE)).to(dtype)
        embeddings[IMAGE[3], :, PIXEL[3] // SHAPE[3], PIXEL[3] % SHAPE[3]] = 0
        drawn = gather_embeddings(embeddings, IMAGE, PIXEL)
        assert drawn.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        rows = by_loop(embeddings, IMAGE, PIXEL).to(drawn.dtype)
        torch.testing.assert_close(drawn, rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))


# ---- on a GPU


def random_draw(number: int, height: int, width: int) -> PixelDraw:
    index = torch.randperm(3 * height * width)[:number]
    labels = torch.zeros_like(index)
    image, pixel = index // (height * width), index % (height * width)
    return PixelDraw(*(x.to(DEVICE) for x in (image, pixel, labels)), None)


@kernel_test
def test_kernels_read_and_write_what_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = list(itertools.product((torch.float32,), (False, True), LAYOUTS))
    forms += itertools.product((torch.bfloat16, torch.float16), (False, True), LAYOUTS[1:2])
    for dtype, normalize, (layout, _) in forms:
        # Maps of other sizes and widths; of the second, two draws that may meet.
        shapes = [(3, 5, 4, 6), (3, 70, 8, 3), (3, 64, 2, 2)]
        draws = [
            [random_draw(n, *shape[2:]) for n in numbers]
            for shape, numbers in zip(shapes, [[33], [40, 50], [0]], strict=True)
        ]
        maps = [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]
        weights = [
            torch.randint(1, 9, (sum(len(d.image) for d in of_map), shape[1]))
            for of_map, shape in zip(draws, shapes, strict=True)
        ]
        results = []
        for on_gpu in (True, False):
            if not on_gpu:
                monkeypatch.setattr(gather, "is_usable", lambda *_: False)
            inputs = [layout(x).requires_grad_() for x in maps]
            rows = gather_draws(inputs, draws, normalize=normalize)
            total = sum(
                (x.float() * w.to(DEVICE)).sum() for x, w in zip(rows, weights, strict=True)
            )
            results.append([*rows, *torch.autograd.grad(total, inputs)])
        monkeypatch.undo()
        for found, expected in zip(*results, strict=True):
            assert found.dtype == expected.dtype
            assert len(found) == 0 or found.stride() == expected.stride()
            # In 16 bits PyTorch rounds what is added up once more.
            torch.testing.assert_close(
                found,
                expected,
                rtol=2e-2 if dtype != torch.float32 else 1e-5,
                atol=1e-2 if dtype != torch.float32 else 1e-5,
            )


@pytest.mark.skipif(RUNS_KERNELS, reason="the kernels run here")
def test_with_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert not is_interpreted()
    command = [sys.executable, "-m", "pytest", "-q", "-k", "kernels_read", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
