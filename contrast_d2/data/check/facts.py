"""What the files of a dataset hold, read pair by pair.

Only the few numbers that the checks need are kept of each pair, so that memory does not grow with
the size of images.

H, W: height and width of an image.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from .. import reading
from ..classes import Color
from ..files import Record
from ..labels import LABEL_MODES
from ..reading import READ_ERRORS
from .alignment import Alignment, measure_alignment

# Labels that went through a lossy format have thousands of colours; the frequent ones will do.
_MOST_COLORS = 256


class ImageFacts(NamedTuple):
    """What an image file holds."""

    error: str = ""
    """Why it cannot be read, if so; the rest is then empty."""
    mode: str = ""
    """Pillow's name of what a pixel is."""
    size: tuple[int, int] = (0, 0)
    """(height, width) upright."""
    turned: bool = False
    """Whether its EXIF data turn it."""
    digest: bytes = b""
    """Equal for equal pixels."""


class LabelFacts(NamedTuple):
    """What a label file holds."""

    error: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    counts: Mapping[int, int] = {}
    """Pixels of each value, of a file with one channel of integers."""
    palette: Mapping[int, Color] = {}
    """RGB of each value that occurs, of a palette image."""
    colors: Mapping[Color, int] = {}
    """Pixels of each RGB colour, the most frequent ones, of a file with several channels."""
    num_colors: int = 0


class PairFacts(NamedTuple):
    """What is known of an image and its labels."""

    split: str
    image_file: str
    label_file: str
    """Empty in a split without labels."""
    image: ImageFacts
    label: LabelFacts | None
    alignment: Alignment | None


def read_pair(split: str, record: Record, id_to_class: Mapping[int, int]) -> PairFacts:
    """Reads the files of one record in full.

    Args:
        split: name of the dataset that it belongs to.
        record: with ``file_name`` and, where there are labels, ``sem_seg_file_name``.
        id_to_class: label value to class id; other values are void or wrong.

    Returns:
        What they hold. Files that cannot be read are facts too.
    """
    image_file, label_file = record["file_name"], record.get("sem_seg_file_name", "")
    image, gray = _read_image(image_file)
    label, values = _read_label(label_file) if label_file else (None, None)
    alignment = None
    if gray is not None and values is not None and gray.shape == values.shape:
        alignment = measure_alignment(gray, _classes(values, id_to_class))
    return PairFacts(split, image_file, label_file, image, label, alignment)


def open_image(path: str) -> Image.Image:
    """Reads and decodes a file in full; Pillow's exceptions are the caller's."""
    with PathManager.open(path, "rb") as file:
        image = reading.open_image(io.BytesIO(file.read()))
    image.load()
    return image


def label_values(image: Image.Image) -> np.ndarray | None:
    """(H, W) integers as stored, or None where a file has several channels or no integers."""
    if image.mode not in LABEL_MODES:
        return None
    values = np.asarray(image)
    return values.astype(np.uint8) if values.dtype == bool else values


def _read_image(path: str) -> tuple[ImageFacts, np.ndarray | None]:
    """Facts and the (H, W) uint8 grey values; None where the file cannot be read."""
    try:
        stored = open_image(path)
        upright = ImageOps.exif_transpose(stored)
        digest = hashlib.blake2b(f"{upright.mode}{upright.size}".encode(), digest_size=16)
        digest.update(upright.tobytes())
        gray = np.asarray(upright.convert("L"))
    except READ_ERRORS as error:
        return ImageFacts(error=str(error)), None
    turned = upright.size != stored.size
    facts = ImageFacts("", stored.mode, gray.shape, turned, digest.digest())
    return facts, gray


def _read_label(path: str) -> tuple[LabelFacts, np.ndarray | None]:
    try:
        image = open_image(path)
        values = label_values(image)
        if values is None:
            return _color_facts(image), None
    except READ_ERRORS as error:
        return LabelFacts(error=str(error)), None
    found, counts = np.unique(values, return_counts=True)
    found = [int(value) for value in found]
    palette = {}
    if image.mode == "P":
        table = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
        palette = {v: tuple(int(c) for c in table[v]) for v in found if v < len(table)}
    counts = dict(zip(found, counts.tolist(), strict=True))
    return LabelFacts("", image.mode, values.shape, counts, palette), values  # pyright: ignore[reportArgumentType]


def _color_facts(image: Image.Image) -> LabelFacts:
    """Facts of a file with several channels."""
    pixels = np.asarray(image.convert("RGB")).astype(np.uint32)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    found, counts = np.unique(packed, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_MOST_COLORS]
    colors = {
        (int(found[i] >> 16), int(found[i] >> 8 & 255), int(found[i] & 255)): int(counts[i])
        for i in most
    }
    size = (image.height, image.width)
    return LabelFacts("", image.mode, size, colors=colors, num_colors=len(found))


def _classes(values: np.ndarray, id_to_class: Mapping[int, int]) -> np.ndarray:
    """(H, W) class ids; -1 for every value that is none."""
    found, index = np.unique(values, return_inverse=True)
    table = np.array([id_to_class.get(int(value), -1) for value in found])
    return table[index].reshape(values.shape)
