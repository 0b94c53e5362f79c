"""Shifted windows on maps of any size. Shape letters: C channels, h w a map, T its tokens."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor

from contrast_d2.backbones import TimmBackbone
from contrast_d2.backbones.swin import pad_before_shift

SWIN = "swin_tiny_patch4_window7_224"


def shifted_block(kind: type = SwinTransformerBlock, window: int = 7) -> torch.nn.Module:
    block = kind(
        dim=8,
        input_resolution=(56, 56),
        num_heads=2,
        window_size=window,
        shift_size=window // 2,
        always_partition=True,
        dynamic_mask=True,
    )
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pad_before_shift(block)
    return block.eval().double()


def attention_of_each_pair(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """Attention among all tokens of a padded (h, w, C) map at once, by the paper's definition.

    Two tokens see each other if they lie in one cell of the grid of windows that is displaced by
    the shift; the cells at the borders are smaller.
    """
    attention, (size, shift) = block.attn, (block.window_size[0], block.shift_size[0])
    height, width, channels = x.shape
    padded = x.new_zeros(-(-height // size) * size, -(-width // size) * size, channels)
    padded[:height, :width] = x
    rows, columns = torch.meshgrid(*map(torch.arange, padded.shape[:2]), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    cells = torch.stack([(rows - shift) // size, (columns - shift) // size], dim=1)
    together = (cells[:, None] == cells[None]).all(dim=2)
    steps = torch.stack([rows[:, None] - rows, columns[:, None] - columns]) + size - 1
    index = (steps[0] * (2 * size - 1) + steps[1]).clamp(0, (2 * size - 1) ** 2 - 1)
    bias = attention.relative_position_bias_table[index].permute(2, 0, 1)

    qkv = attention.qkv(padded.view(-1, channels)).view(-1, 3, attention.num_heads, channels // 2)
    query, key, value = qkv.permute(1, 2, 0, 3)
    scores = query @ key.mT * (channels // 2) ** -0.5 + bias
    weights = scores.masked_fill(~together, -torch.inf).softmax(dim=-1)
    out = attention.proj((weights @ value).transpose(0, 1).reshape(-1, channels))
    return out.view(padded.shape)[:height, :width]


def test_windows_are_those_of_the_paper_whatever_the_size(subtests: pytest.Subtests) -> None:
    for size in [(14, 21), (16, 16), (9, 20), (13, 8), (3, 5)]:
        with subtests.test(size=size):
            block = shifted_block()
            x = torch.randn(1, *size, 8, dtype=torch.float64)
            with torch.no_grad():
                torch.testing.assert_close(block._attn(x)[0], attention_of_each_pair(block, x[0]))


@pytest.mark.parametrize(
    ("kind", "window"), [(SwinTransformerBlock, 7), (SwinTransformerV2Block, 8)]
)
def test_opposite_borders_do_not_see_each_other(kind: type, window: int) -> None:
    block = shifted_block(kind, window)
    x = torch.randn(1, 17, 18, 8, dtype=torch.float64, requires_grad=True)
    (at_bottom,) = torch.autograd.grad(block(x)[:, -1].sum(), x)
    assert at_bottom[:, -1].abs().min() > 1e-6
    assert at_bottom[:, :window].abs().max() < 1e-12


def test_every_stage_shifts_at_sizes_beyond_the_pretraining() -> None:
    with torch.device("meta"):
        model = TimmBackbone(SWIN).model
    shifts = [m.shift_size for m in model.modules() if isinstance(m, SwinTransformerBlock)]
    assert shifts == [(0, 0), (3, 3)] * 6


def test_where_windows_fit_nothing_differs_from_timm() -> None:
    backbone = TimmBackbone(SWIN, out_features=["res2", "res3"]).eval()
    plain = timm.create_model(
        SWIN, features_only=True, out_indices=(0, 1), strict_img_size=False, always_partition=True
    ).eval()
    plain.load_state_dict(backbone.model.state_dict())
    images = torch.randn(1, 3, 56, 112)
    with torch.no_grad():
        found, expected = backbone(images), plain(images)
        assert not torch.equal(backbone(images[..., 8:])["res3"], found["res3"][..., 1:])
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert torch.equal(ours, theirs.permute(0, 3, 1, 2))


def test_a_copy_runs_with_its_own_weights() -> None:
    block = shifted_block()
    other = copy.deepcopy(block)
    x = torch.randn(1, 9, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        before = other(x)
        block.attn.proj.weight.zero_()
        assert torch.equal(other(x), before)
        assert not torch.equal(block(x), before)


@pytest.mark.parametrize("size", [(97, 131), (512, 1024)])
def test_maps_of_images_that_are_no_whole_windows(size: tuple[int, int]) -> None:
    padded = [-(-side // 32) * 32 for side in size]
    with torch.device("meta"):
        found = TimmBackbone(SWIN)(torch.empty(1, 3, *padded))
    assert [tuple(x.shape[-2:]) for x in found.values()] == [
        (padded[0] // stride, padded[1] // stride) for stride in (4, 8, 16, 32)
    ]
