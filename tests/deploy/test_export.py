"""The exported network: the same scores, for any size or the one that it is exported for."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from contrast_d2.backbones import TimmBackbone
from contrast_d2.decoders import FCNDecoder
from contrast_d2.deploy import export
from contrast_d2.segmentor import ContrastiveSegmentor
from contrast_d2.structures import SegOutput

from ..tiny import NUM_CLASSES, tiny_contrast, tiny_segmentor


def small(contrast: nn.Module | None = None) -> ContrastiveSegmentor:
    return tiny_segmentor(contrast, FCNDecoder)


def pyramid() -> ContrastiveSegmentor:
    """Means over grids, a pyramid, an auxiliary head, and norms that do not leave 1 as it is."""
    model = tiny_segmentor()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (50, 71)])
def test_scores_are_the_segmentors(size: tuple[int, int], align_corners: bool) -> None:
    model = small(tiny_contrast()).train()
    model.sem_seg_head.align_corners = align_corners
    images = 255 * torch.rand(2, 3, *size)
    inference = export.InferenceModel(model)
    found = inference(images)
    expected = model([{"image": image} for image in images])
    assert found.shape == (2, NUM_CLASSES, *size)
    assert all(torch.equal(a, b["sem_seg"]) for a, b in zip(found, expected, strict=True))
    assert not [name for name in inference.state_dict() if name.startswith("contrast.")]


@pytest.mark.slow
def test_graph_and_onnx_give_the_models_scores_at_any_size() -> None:
    model = export.InferenceModel(pyramid())
    shapes = export.shapes_to_check(model, None)
    # Padded on no side, on one, and on both.
    assert [sum(side % 8 > 0 for side in shape[2:]) for shape in shapes] == [0, 1, 2]
    program = export.export_program(model)
    for difference in export.compare(program.module(), model, shapes):
        assert difference.largest < 1e-6
    content = export.onnx_bytes(program)
    for difference in export.compare(export.onnx_runner(content), model, shapes):
        assert difference.is_rounding and difference.argmax > 0.999
    (taken,), (given,) = _onnx_shapes(content)
    assert taken == ["batch", 3, "height", "width"]
    assert given[:2] == ["batch", NUM_CLASSES]
    assert all(isinstance(side, str) for side in given[2:])


def _onnx_shapes(content: bytes) -> list[list[list[int | str]]]:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load_from_string(content).graph
    assert [x.name for x in (*graph.input, *graph.output)] == ["images", "logits"]
    return [
        [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in values]
        for values in (graph.input, graph.output)
    ]


def test_a_fixed_size_is_the_only_one() -> None:
    model = export.InferenceModel(small())
    run = export.export_program(model, size=(30, 42)).module()
    for difference in export.compare(run, model, export.shapes_to_check(model, (30, 42))):
        assert difference.largest < 1e-6
    with pytest.raises(AssertionError, match="size"):
        run(torch.zeros(1, 3, 42, 30))


class FixedDecoder(nn.Module):
    """Holds for maps of 16x22 only, and says so to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16, 22))

    def decode(self, features: dict[str, Tensor]) -> SegOutput:
        return SegOutput(features["res2"] * self.weight, None, {})


def test_what_cannot_be_left_open_is_told() -> None:
    segmentor = small()
    segmentor.sem_seg_head = FixedDecoder()
    model = export.InferenceModel(segmentor)
    with pytest.raises(ValueError, match="--size HEIGHT"):
        export.export_program(model)
    with pytest.raises(ValueError, match="no export at 30x42"):
        export.export_program(model, size=(30, 42))
    export.export_program(model, size=(60, 84))


def test_swin_needs_a_size() -> None:
    segmentor = small()
    with torch.device("meta"):
        segmentor.backbone = TimmBackbone("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="Swin.* --size HEIGHT WIDTH"):
        export.export_program(export.InferenceModel(segmentor))


@pytest.mark.parametrize("size", [(0, 64), (64,)])
def test_sizes_are_checked(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="give height and width"):
        export.export_program(export.InferenceModel(small()), size=size)


def test_a_small_difference_is_more_than_rounding() -> None:
    model = export.InferenceModel(small())
    shapes = [(1, 3, 32, 32)]
    (near,) = export.compare(lambda images: model(images) * (1 + 1e-6), model, shapes)
    (far,) = export.compare(lambda images: model(images) * (1 + 1e-3), model, shapes)
    (flipped,) = export.compare(lambda images: -model(images), model, shapes)
    assert near.is_rounding and near.largest == pytest.approx(1e-6, rel=0.3)
    assert not far.is_rounding and far.argmax == 1
    assert flipped.largest == pytest.approx(2) and flipped.argmax < 0.5


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for package in ["onnx", "onnxscript", "onnxruntime"]:
        with subtests.test(package=package), monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            program = export.export_program(export.InferenceModel(small()), size=(8, 8))
            run = export.onnx_runner if package == "onnxruntime" else export.onnx_bytes
            with pytest.raises(ValueError, match=rf"{package}.* 'contrast_d2\[export\]'"):
                run(b"" if package == "onnxruntime" else program)
