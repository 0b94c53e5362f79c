"""Image files to arrays, by the fastest decoder that gives the same pixels as Pillow.

Common JPEG and PNG files are decoded by kornia-rs where it is installed (the extra ``fast``): it
has libjpeg-turbo, as Pillow has, and a faster PNG decoder. What is unusual or damaged goes to
Pillow, as do all other formats, so that results and errors never depend on the decoder.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

try:
    from kornia_rs import io as kornia_io
except ImportError:
    kornia_io = None

# What files that cannot be read make Pillow raise.
READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
# PNG's colour types by number of channels, and kornia-rs' names.
_PNG_KINDS = {1: (0, "mono"), 3: (2, "rgb")}
# Chunks that may say how an image is to be turned, with the keywords of those that hold text.
_PNG_EXIF = b"eXIf"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_EXIF_KEYWORDS = (b"Raw profile type ", b"XML:com.adobe.xmp")


def read_rgb(path: str) -> np.ndarray:
    """Reads an image file, turned upright where its EXIF data say how.

    Args:
        path: of the file, opened through detectron2's PathManager.

    Returns:
        (H, W, 3) uint8, RGB; the same as detectron2's `read_image`. It may be read-only.

    Raises:
        ValueError: if the file cannot be read. The message names it.
    """
    try:
        with PathManager.open(path, "rb") as file:
            data = file.read()
        image = None
        if data.startswith(_JPEG_SIGNATURE):
            image = _decode_jpeg(data)
        elif data.startswith(_PNG_SIGNATURE) and not _png_may_be_turned(data):
            image = decode_png(data, channels=3)
        return read_image(path, format="RGB") if image is None else image
    except READ_ERRORS as error:
        raise ValueError(f"Cannot read the image {path}: {error}") from error


def decode_png(data: bytes, channels: int) -> np.ndarray | None:
    """Decodes a PNG file that holds just so many channels of 8 bits.

    Args:
        data: contents of a file.
        channels: 1, (H, W), or 3, (H, W, 3).

    Returns:
        The pixels as stored, uint8, or None for Pillow to be asked: the file is something else or
        damaged, or kornia-rs is not installed.
    """
    if kornia_io is None or not data.startswith(_PNG_SIGNATURE) or len(data) < 29:
        return None
    width, height, *kind = struct.unpack_from(">IIBBBBB", data, 16)
    color_type, mode = _PNG_KINDS[channels]
    # The last three are the compression, the filter and the interlacing, of which 0 is the usual.
    most_pixels = Image.MAX_IMAGE_PIXELS  # more would make Pillow warn or refuse; None is no limit
    if kind != [8, color_type, 0, 0, 0] or (most_pixels and width * height > most_pixels):
        return None
    try:
        pixels = kornia_io.decode_image_png_u8(data, (height, width), mode)
    except Exception:  # it raises nothing more precise
        return None
    return pixels if channels == 3 else pixels[:, :, 0]


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decodes an upright grey or RGB JPEG file as (H, W, 3) uint8, or returns None for Pillow."""
    if kornia_io is None:
        return None
    with Image.open(io.BytesIO(data)) as image:  # reads no more than the head of the file
        if (
            image.format != "JPEG"
            or image.mode not in ("RGB", "L")
            or image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        ):
            return None
    try:
        return kornia_io.decode_image_jpegturbo(data, "rgb")
    except Exception:  # it raises nothing more precise
        return None


def _png_may_be_turned(data: bytes) -> bool:
    """Whether a PNG file has a chunk, before or behind its pixels, that can hold an orientation."""
    return any(
        kind == _PNG_EXIF or (kind in _PNG_TEXTS and data.startswith(_PNG_EXIF_KEYWORDS, start))
        for kind, start in _png_chunks(data)
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The kind of each chunk and where its contents start."""
    start = len(_PNG_SIGNATURE) + 8
    while start <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start - 8)
        yield kind, start
        start += length + 12
