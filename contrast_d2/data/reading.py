"""Image files to arrays, by the fastest decoder that gives the same pixels as Pillow.

Common JPEG and PNG files are decoded by kornia-rs where it is installed (the extra ``fast``): it
has libjpeg-turbo, as Pillow has, and a faster PNG decoder. What is unusual or damaged goes to
Pillow, as do all other formats, so that results and errors never depend on the decoder.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import IO

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

try:
    from kornia_rs import io as kornia_io
except ImportError:
    kornia_io = None

# All that is read, whatever a file is called. Pillow knows some fifty formats, of which EPS starts
# another program, Ghostscript.
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")

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


def open_image(file: str | IO[bytes]) -> Image.Image:
    """Opens an image file, as Pillow's function does, of one of `IMAGE_FORMATS`."""
    return Image.open(file, formats=IMAGE_FORMATS)


def read_rgb(path: str) -> np.ndarray:
    """Reads an image file, turned upright where its EXIF data say how.

    Args:
        path: of the file, opened through detectron2's PathManager.

    Returns:
        (H, W, 3) uint8, RGB; the same as detectron2's `read_image`, but for grey images of 16 bits,
        which that clips to white: 65535 becomes 255. It may be read-only.

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
        return _decode_with_pillow(data) if image is None else image
    except READ_ERRORS as error:
        raise ValueError(f"Cannot read the image {path}: {error}") from error


def _decode_with_pillow(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8, upright."""
    with open_image(io.BytesIO(data)) as image:
        # Pillow may hold a PNG file of 16 bits as 32.
        is_deep = image.mode.startswith("I;16") or (image.format, image.mode) == ("PNG", "I")
        if not is_deep and image.mode in ("I", "F"):
            raise ValueError("it has 32 bits a pixel: store it with 8 or 16 bits a channel")
        upright = _apply_exif_orientation(image)
        if not is_deep:
            return convert_PIL_to_numpy(upright, "RGB")
        grey = (np.asarray(upright).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


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
    with open_image(io.BytesIO(data)) as image:  # reads no more than the head of the file
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
