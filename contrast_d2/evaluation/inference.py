"""Test protocols: which views of an image a model sees, and how their scores become one.

Each wrapper has the interface of the model that it wraps, so that they nest:
`MultiScaleFlip(SlidingWindow(model, window=512), scales=(0.5, 1.0), flip=True)`. Nothing of an
image is kept once the next one comes.

Shape letters: K classes, H W an image, h w a window of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Image = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class InferenceProtocol:
    """The settings of a test protocol, which are known before the model is.

    `InferenceProtocol(...)(model)` wraps a model; the default is the model itself. The order is
    that of `MultiScaleFlip(SlidingWindow(model))`: an image is resized and flipped, then each of
    these views is run, whole or window by window.

    Args:
        scales: factors on the size of the image, after `short_side` and `long_side`.
        flip: also run the mirror image of each view.
        short_side, long_side: resize to these sides first, see `resized_size`; None for the
            image's own size.
        window: (height, width) of the windows, or one number for both; None for whole images.
        stride: (vertical, horizontal) step between windows, or one number for both; None for
            windows that do not overlap.
        batch_size: windows that are run together.
        pad_value: colour that fills a view up to the window, see `SlidingWindow`.
        accumulate_on_cpu: sum up the scores of views and windows in the memory of the host.

    Raises:
        ValueError: a setting out of range, or a stride without a window.
    """

    scales: Sequence[float] = (1.0,)
    flip: bool = False
    short_side: int | None = None
    long_side: int | None = None
    window: int | Sequence[int] | None = None
    stride: int | Sequence[int] | None = None
    batch_size: int = 1
    pad_value: Sequence[float] | None = None
    accumulate_on_cpu: bool = False

    def __post_init__(self) -> None:
        if self.window is None and self.stride is not None:
            raise ValueError(f"stride={self.stride} without windows: set window too.")
        self(nn.Identity())  # mistakes come out here, and not after hours of training

    def __call__(self, model: nn.Module) -> nn.Module:
        """The model, wrapped in what the settings ask for.

        Args:
            model: with the interface of detectron2's semantic segmentation models.
        """
        if self.window is not None:
            model = SlidingWindow(
                model,
                window=self.window,
                stride=self.stride,
                batch_size=self.batch_size,
                pad_value=self.pad_value,
                accumulate_on_cpu=self.accumulate_on_cpu,
            )
        views = MultiScaleFlip(
            model,
            scales=self.scales,
            flip=self.flip,
            short_side=self.short_side,
            long_side=self.long_side,
            accumulate_on_cpu=self.accumulate_on_cpu,
        )
        return model if views.sees_the_image_only else views


class SlidingWindow(nn.Module):
    """Runs a model on windows of an image, and averages the class scores where windows overlap.

    The last window of a row or column is moved back into the image. Scores are averaged as the
    model gives them, for its logits before any softmax.

    Args:
        model: with the interface of detectron2's semantic segmentation models.
        window: (height, width) in pixels of the image as it comes in, or one number for both.
        stride: (vertical, horizontal) step between windows, or one number for both; None for that
            of the window, so that windows overlap only where the last one was moved back.
        batch_size: windows of an image that are run together.
        pad_value: a value per channel, in the units of the image, that fills an image smaller than
            the window up to it, to the right and below; with the model's mean this is the padding
            that the model itself applies. None runs such an image at its own size.
        accumulate_on_cpu: keep the sum in the memory of the host, for images whose scores do not
            fit beside the model.

    Raises:
        ValueError: a setting out of range, or a stride beyond the window, which would leave gaps.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        batch_size: int = 1,
        pad_value: Sequence[float] | None = None,
        accumulate_on_cpu: bool = False,
    ) -> None:
        super().__init__()
        self.window = _checked_pair("window", window)
        self.stride = self.window if stride is None else _checked_pair("stride", stride)
        if any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(
                f"stride={self.stride} is beyond window={self.window} and would leave pixels "
                "without a prediction: make it at most the window."
            )
        _check_positive("batch_size", batch_size)
        _check_flag("accumulate_on_cpu", accumulate_on_cpu)
        self.model = model
        self.training = model.training
        self.batch_size = batch_size
        self.pad_value = None if pad_value is None else tuple(float(v) for v in pad_value)
        self.accumulate_on_cpu = accumulate_on_cpu

    @torch.no_grad()
    def forward(self, batched_inputs: list[Image]) -> list[dict[str, Tensor]]:
        """Runs images one after the other.

        Args:
            batched_inputs: a dict per image: "image" (3, H, W); optionally "height" and "width",
                the size of the output.

        Returns:
            A dict per image with "sem_seg", the (K, height, width) class scores in fp32.

        Raises:
            RuntimeError: the model is in training mode.
        """
        _check_eval_mode(self.model)
        return [{"sem_seg": self._scores(x)} for x in batched_inputs]

    def _scores(self, x: Image) -> Tensor:
        image = self._padded(to_device(x["image"], _device_of(self.model)))
        height, width = image.shape[-2:]
        window = min(self.window[0], height), min(self.window[1], width)
        tops = _starts(height, window[0], self.stride[0])
        lefts = _starts(width, window[1], self.stride[1])
        corners = list(itertools.product(tops, lefts))
        total_KHW = None
        for first in range(0, len(corners), self.batch_size):
            batch = corners[first : first + self.batch_size]
            windows = [
                image[:, top : top + window[0], left : left + window[1]] for top, left in batch
            ]
            views = [{**x, "image": w, "height": window[0], "width": window[1]} for w in windows]
            for (top, left), output in zip(batch, self.model(views), strict=True):
                scores_Khw = output["sem_seg"]
                if total_KHW is None:
                    total_KHW = torch.zeros(
                        *(len(scores_Khw), height, width),
                        device="cpu" if self.accumulate_on_cpu else scores_Khw.device,
                    )
                part = total_KHW[:, top : top + window[0], left : left + window[1]]
                part += scores_Khw.to(part.device)
        assert total_KHW is not None
        # Windows lie on a grid, so how many cover a pixel is a product of rows and columns.
        total_KHW /= to_device(_cover(tops, window[0], height), total_KHW.device)[:, None]
        total_KHW /= to_device(_cover(lefts, window[1], width), total_KHW.device)
        return _at_output_size(total_KHW, x)

    def _padded(self, image: Tensor) -> Tensor:
        """The image, filled up to the window where it is smaller and a colour is given."""
        height, width = image.shape[-2:]
        size = max(height, self.window[0]), max(width, self.window[1])
        if self.pad_value is None or size == (height, width):
            return image
        if len(self.pad_value) != len(image):
            raise ValueError(
                f"pad_value has {len(self.pad_value)} entries for an image with {len(image)} "
                "channels: give one per channel."
            )
        colour = to_device(torch.tensor(self.pad_value), image.device)
        padded = colour[:, None, None].repeat(1, *size)
        padded[:, :height, :width] = image
        return padded


class MultiScaleFlip(nn.Module):
    """Averages the class probabilities of a model over resized and mirrored views of an image.

    The scores of each view are resized to the output's size, turned into probabilities there, and
    all views count alike. Images are resized bilinearly with antialiasing, as in training.

    Args:
        model: with the interface of detectron2's semantic segmentation models.
        scales: factors on the size of the image, each once; 1 is a view only if it is among them.
        flip: also run the mirror image of each view.
        short_side, long_side: see `resized_size`.
        accumulate_on_cpu: keep the sum in the memory of the host.

    Raises:
        ValueError: no scale, one that is not a positive number or is there twice, or a side below
            1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        short_side: int | None = None,
        long_side: int | None = None,
        accumulate_on_cpu: bool = False,
    ) -> None:
        super().__init__()
        self.scales = _checked_scales(scales)
        _check_flag("flip", flip)
        _check_flag("accumulate_on_cpu", accumulate_on_cpu)
        for name, side in (("short_side", short_side), ("long_side", long_side)):
            if side is not None:
                _check_positive(name, side)
        self.model = model
        self.training = model.training
        self.flip = flip
        self.short_side = short_side
        self.long_side = long_side
        self.accumulate_on_cpu = accumulate_on_cpu

    @property
    def sees_the_image_only(self) -> bool:
        """Whether the only view of an image is the image itself."""
        views = (self.scales, self.flip, self.short_side, self.long_side)
        return views == ((1.0,), False, None, None)

    @torch.no_grad()
    def forward(self, batched_inputs: list[Image]) -> list[dict[str, Tensor]]:
        """Runs all views of a batch, one view after the other.

        Args:
            batched_inputs: a dict per image: "image" (3, H, W); optionally "height" and "width",
                the size of the output.

        Returns:
            A dict per image with "sem_seg": (K, height, width), here probabilities in fp32, which
            sum to 1 over the classes, where a model itself gives logits. The argmax is the
            prediction in either case.

        Raises:
            RuntimeError: the model is in training mode.
        """
        _check_eval_mode(self.model)
        device = _device_of(self.model)
        batched_inputs = [{**x, "image": to_device(x["image"], device)} for x in batched_inputs]
        totals: list[Tensor | None] = [None] * len(batched_inputs)
        for scale, flipped in itertools.product(self.scales, (False, True)[: 1 + self.flip]):
            views = [self._view(x, scale, flipped) for x in batched_inputs]
            for i, output in enumerate(self.model(views)):
                probabilities_KHW = output["sem_seg"].float().softmax(dim=0)
                if flipped:
                    probabilities_KHW = probabilities_KHW.flip(-1)
                if self.accumulate_on_cpu:
                    probabilities_KHW = probabilities_KHW.cpu()
                total = totals[i]
                totals[i] = probabilities_KHW if total is None else total.add_(probabilities_KHW)
        num_views = len(self.scales) * (1 + self.flip)
        return [{"sem_seg": total.div_(num_views)} for total in totals if total is not None]

    def _view(self, x: Image, scale: float, flipped: bool) -> Image:
        image = x["image"]
        height, width = image.shape[-2:]
        size = resized_size(
            height, width, scale=scale, short_side=self.short_side, long_side=self.long_side
        )
        if size != (height, width):
            image = F.interpolate(
                image[None].float(), size, mode="bilinear", align_corners=False, antialias=True
            )[0]
        if flipped:
            image = image.flip(-1)
        output_height, output_width = x.get("height", height), x.get("width", width)
        return {**x, "image": image, "height": output_height, "width": output_width}


def resized_size(
    height: int,
    width: int,
    *,
    scale: float = 1.0,
    short_side: int | None = None,
    long_side: int | None = None,
) -> tuple[int, int]:
    """The size of an image that keeps its aspect ratio and gets a given short or long side.

    Args:
        height, width: of the image, in pixels.
        scale: factor on the sides asked for, or on the image where none is.
        short_side: length that the shorter side gets.
        long_side: length that the longer side gets; with both, neither side exceeds its own.

    Returns:
        (height, width), each rounded to the nearest pixel, halves upwards, and at least 1.
    """
    sides = ((short_side, min(height, width)), (long_side, max(height, width)))
    # A fraction rather than a factor, so that the side that is asked for comes out exactly.
    fractions = [(scale * wanted, side) for wanted, side in sides if wanted is not None]
    numerator, denominator = min(fractions, key=lambda f: f[0] / f[1], default=(scale, 1))
    resized = (math.floor(x * numerator / denominator + 0.5) for x in (height, width))
    new_height, new_width = (max(1, x) for x in resized)
    return new_height, new_width


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side, the last one moved back so that it ends with the side."""
    count = -(-(length - window) // stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


def _cover(starts: Sequence[int], window: int, length: int) -> Tensor:
    """(length,) how many windows cover each position along a side."""
    cover = torch.zeros(length)
    for start in starts:
        cover[start : start + window] += 1
    return cover


def _at_output_size(scores_KHW: Tensor, x: Image) -> Tensor:
    """The scores without padding, at the size that is asked of the output."""
    height, width = x["image"].shape[-2:]
    size = x.get("height", height), x.get("width", width)
    scores_KHW = scores_KHW[:, :height, :width]
    if size == (height, width):
        return scores_KHW
    return F.interpolate(scores_KHW[None], size, mode="bilinear", align_corners=False)[0]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, copied there while the host goes on."""
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()  # a GPU reads other memory only while the host waits
    return tensor.to(device, non_blocking=True)


def _device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU for one without any."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next(tensors, torch.empty(0)).device


def _check_eval_mode(model: nn.Module) -> None:
    if model.training:
        raise RuntimeError("a test protocol was run on a model in training mode: call eval() first")


def _checked_scales(scales: Sequence[float]) -> tuple[float, ...]:
    if isinstance(scales, (int, float, str)):
        raise ValueError(f"scales={scales!r}: give a list, as in [0.75, 1.0, 1.25].")
    values = tuple(float(s) for s in scales)
    if not values or not all(0 < s < math.inf for s in values):
        raise ValueError(f"scales={list(values)}: give at least one number, each above 0.")
    if len(set(values)) != len(values):
        raise ValueError(f"scales={list(values)}: name each once, or it would count twice.")
    return values


def _checked_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, (int, float)) else tuple(value)
    if len(pair) != 2 or not all(isinstance(x, int) and x >= 1 for x in pair):
        raise ValueError(
            f"{name}={value}: give (height, width), or one number for both, in pixels of 1 or more."
        )
    return pair


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: needs a whole number of 1 or more.")


def _check_flag(name: str, value: bool) -> None:
    # "no" on a command line is a string, and true.
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False.")
