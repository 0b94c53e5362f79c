"""The network that is left at test time, as a graph that runs without this library.

Shape letters: B images, K classes, H W the images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from ..losses import upsample
from ..segmentor import ContrastiveSegmentor
from ..structures import decode

_INPUT, _OUTPUT = "images", "logits"
_DIMENSIONS = {0: "batch", 2: "height", 3: "width"}
# Largest difference to eager, as a part of the largest score: what rounding in another order of
# sums leaves of fp32, with room for deep networks.
_TOLERANCE = 1e-4


class InferenceModel(nn.Module):
    """Images to class scores of the same size, with all that lies between; the contrast is gone.

    It shares its weights with the segmentor, and its scores are the segmentor's, bit for bit.

    Args:
        segmentor: trained; it is put into evaluation mode.

    Attributes:
        size_divisibility: images are padded to multiples of this, inside.
    """

    def __init__(self, segmentor: ContrastiveSegmentor) -> None:
        super().__init__()
        segmentor.eval()
        self.backbone = segmentor.backbone
        self.sem_seg_head = segmentor.sem_seg_head
        self.size_divisibility = segmentor._size_divisibility
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", segmentor.pixel_mean, persistent=False)
        self.register_buffer("pixel_std", segmentor.pixel_std, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Args: images (B, 3, H, W) in the units of the training images, 0..255. Returns the class
        scores (B, K, H, W) in fp32."""
        height, width = images.shape[-2:]
        bottom = _round_up(height, self.size_divisibility) - height
        right = _round_up(width, self.size_divisibility) - width
        images = (images - self.pixel_mean) / self.pixel_std
        images = F.pad(images, (0, right, 0, bottom))
        output = decode(self.sem_seg_head, self.backbone(images))
        logits = upsample(output.logits, images.shape[-2:], output.align_corners)
        # Cropped by a negative padding: slices of a size that is left open bring conditions on it,
        # which an exported graph holds against every other size.
        return F.pad(logits, (0, -right, 0, -bottom))


class Difference(NamedTuple):
    """How far scores are from those of the eager model.

    Attributes:
        shape: (B, 3, H, W) of the images.
        largest: largest absolute difference, as a part of the largest absolute score.
        argmax: share of pixels with the same class, 0..1.
    """

    shape: tuple[int, ...]
    largest: float
    argmax: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it."""
        return self.largest <= _TOLERANCE


def export_program(model: InferenceModel, *, size: Sequence[int] | None = None) -> ExportedProgram:
    """Captures the model as one graph, for any number of images.

    Args:
        model: on the CPU.
        size: height and width of the images; None leaves them open. They are then larger than
            `model.size_divisibility`.

    Returns:
        A graph with the input `images` and the output `logits`, as in `InferenceModel.forward`.

    Raises:
        ValueError: a size that is no size, or one that this model cannot leave open.
    """
    if size is None:
        _check_sizes_can_be_open(model)
        least = model.size_divisibility + 1
        # Sizes of their own, none a multiple of another: a graph is captured for all sizes, but one
        # that happens to fit a special case could be captured for that alone.
        height, width = 3 * least, 4 * least + 5
        sides = {2: Dim("height", min=least), 3: Dim("width", min=least)}
    else:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size={tuple(size)}: give height and width, both at least 1.")
        (height, width), sides = size, {}
    images = torch.zeros(2, 3, height, width)
    try:
        with torch.no_grad():
            return torch.export.export(
                model, (images,), dynamic_shapes={_INPUT: {0: Dim("batch", min=1), **sides}}
            )
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if size is not None:
            raise ValueError(f"no export at {height}x{width}: {reason}") from error
        raise ValueError(
            f"this model cannot leave height and width open ({reason}): export it for one size "
            "with --size HEIGHT WIDTH."
        ) from error


def onnx_bytes(program: ExportedProgram) -> bytes:
    """An exported graph as the content of an ONNX file, weights included.

    Raises:
        ValueError: the packages of the extra `export` are not installed, or ONNX lacks something
            that the graph needs.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"ONNX needs a package that is not installed ({error.name}): "
            "pip install 'contrast_d2[export]'."
        ) from error
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                dynamic_shapes={_INPUT: _open_dimensions(program)},
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(
            f"ONNX cannot express this graph ({reason}): export it for one size with --size HEIGHT "
            "WIDTH, or with --format torch_export."
        ) from error
    assert exported is not None
    return exported.model_proto.SerializeToString()


def onnx_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    """Runs an ONNX file with onnxruntime on the CPU.

    Args:
        content: of the file.

    Returns:
        images (B, 3, H, W) -> logits (B, K, H, W).

    Raises:
        ValueError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "a check of ONNX needs onnxruntime: pip install 'contrast_d2[export]'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([_OUTPUT], {_INPUT: images.numpy()})
        return torch.from_numpy(logits)

    return run


def shapes_to_check(model: InferenceModel, size: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Shapes of images that between them need padding on both sides, on one, and on none.

    Args:
        model: what is exported.
        size: the only height and width, or None where they are open.

    Returns:
        Shapes (B, 3, H, W) with one, two and three images.
    """
    if size is not None:
        return [(count, 3, *size) for count in (1, 2, 3)]
    unit = max(32, model.size_divisibility)
    return [
        (1, 3, 2 * unit, 3 * unit),
        (2, 3, 5 * unit - 7, 2 * unit),
        (3, 3, unit + 1, 3 * unit + 2),
    ]


@torch.no_grad()
def compare(
    run: Callable[[Tensor], Tensor], model: InferenceModel, shapes: Sequence[Sequence[int]]
) -> list[Difference]:
    """Compares an exported graph with the eager model on random images.

    Args:
        run: images -> logits, of the exported graph.
        model: the eager model.
        shapes: (B, 3, H, W) of each comparison.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes:
        images = 255 * torch.rand(tuple(shape), generator=generator)
        expected, logits = model(images), run(images)
        largest = (logits - expected).abs().max() / expected.abs().max()
        same = logits.argmax(dim=1) == expected.argmax(dim=1)
        found.append(Difference(tuple(shape), largest.item(), same.float().mean().item()))
    return found


def _check_sizes_can_be_open(model: nn.Module) -> None:
    # The capture of shifted windows over maps of any size does not end within minutes.
    if any(isinstance(module, WindowAttention) for module in model.modules()):
        raise ValueError(
            "Swin's windows need images of a fixed size: export with --size HEIGHT WIDTH."
        )


def _open_dimensions(program: ExportedProgram) -> dict[int, str]:
    """Names of the dimensions of the images that have no fixed size, by position."""
    (images,) = (node for node in program.graph.nodes if node.name == _INPUT)
    sizes = images.meta["val"].shape
    return {i: name for i, name in _DIMENSIONS.items() if not isinstance(sizes[i], int)}


def _round_up(size: int, divisibility: int) -> int:
    # As a product: that its quotient by the divisor is whole is then plain to the capture.
    return (size + divisibility - 1) // divisibility * divisibility


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress, which goes to its logger and to stdout, to errors."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
