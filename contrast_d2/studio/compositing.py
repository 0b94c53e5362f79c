"""Pictures of predictions that keep the pixels of the image: legends, panels, boxes.

Drawn with Pillow, fast enough for the frames of a video. Shape letters: K classes, H W the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .differences import FIRST, NEITHER, SECOND, Region
from .visualize import LINE_COLORS, TEXT

# Of boxes, by which prediction is right in them; Okabe and Ito's colours, as of the lines of plots.
BOX_COLORS = {FIRST: LINE_COLORS[5], SECOND: LINE_COLORS[4], NEITHER: "#FFFFFF", None: "#FFFFFF"}
_EDGE = "#000000"
_BACKGROUND = "#FFFFFF"


class Entry(NamedTuple):
    """One entry of a legend."""

    name: str
    color: str | tuple[int, ...]
    weight: float
    """Where there is no room for all entries, those with the most weight are shown."""
    is_box: bool = False
    """Whether it stands for a frame around a region rather than for painted pixels."""


def palette_image(ids: np.ndarray, colors: Sequence[Sequence[int]]) -> Image.Image:
    """A map of class ids as an image of indices, which are the ids, with the classes' colours.

    Args:
        ids: (H, W) uint8 in 0..K-1.
        colors: K RGB triples in 0..255.
    """
    image = Image.fromarray(ids)
    image.putpalette([value for color in colors for value in color])
    return image


def blend(
    image: np.ndarray, ids: np.ndarray, colors: Sequence[Sequence[int]], opacity: float
) -> np.ndarray:
    """Lays the colours of a map of class ids over an image, as `visualize.overlay` does for maps
    that have ignored pixels.

    Args:
        image: (H, W, 3) uint8, RGB.
        ids: (H, W) uint8 in 0..K-1.
        colors: K RGB triples in 0..255.
        opacity: of the colours, 0..1.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    painted = palette_image(ids, colors).convert("RGB")
    return np.asarray(Image.blend(Image.fromarray(image), painted, opacity))


def class_entries(
    maps: Sequence[np.ndarray], names: Sequence[str], colors: Sequence[Sequence[int]]
) -> list[Entry]:
    """Legend entries of the classes that occur, in the order of the classes.

    Args:
        maps: (H, W) uint8 each, class ids in 0..K-1 or a label that is no class.
        names: K names.
        colors: K RGB triples in 0..255.
    """
    counts = np.sum([np.bincount(ids.ravel(), minlength=256) for ids in maps], axis=0)
    return [
        Entry(names[k], tuple(colors[k]), float(counts[k])) for k in range(len(names)) if counts[k]
    ]


def with_legend(
    picture: np.ndarray,
    entries: Sequence[Entry],
    *,
    text_size: int,
    rows: int | None = None,
) -> np.ndarray:
    """Puts a legend under a picture.

    Args:
        picture: (H, W, 3) uint8, RGB.
        entries: in their order.
        text_size: in pixels.
        rows: how many rows the legend has, whatever there is to show, so that all frames of a video
            have one size; None takes as many as the entries need.

    Returns:
        (H + legend, W, 3) uint8, RGB.
    """
    width = picture.shape[1]
    if rows is not None:
        entries = _that_fit(entries, rows, width, text_size)
    lines = _lines(entries, width, text_size)
    row_height = _row_height(text_size)
    strip = Image.new("RGB", (width, row_height * (len(lines) if rows is None else rows)))
    draw = ImageDraw.Draw(strip)
    draw.rectangle((0, 0, *strip.size), fill=_BACKGROUND)
    for i, line in enumerate(lines):
        for x, entry in line:
            _draw_entry(draw, entry, x, i * row_height, text_size)
    return np.concatenate([picture, np.asarray(strip)])


def panels(pictures: Mapping[str, np.ndarray], *, text_size: int, columns: int) -> np.ndarray:
    """Puts pictures of one size beside each other, each under its title.

    Args:
        pictures: title to (H, W, 3) uint8, RGB.
        text_size: in pixels.
        columns: how many lie in a row.

    Returns:
        (rows, columns, 3) uint8, RGB, on white.
    """
    height, width = next(iter(pictures.values())).shape[:2]
    gap, head = max(4, text_size // 3), _row_height(text_size)
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    size = columns * (width + gap) - gap, rows * (head + height)
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, (title, picture) in enumerate(pictures.items()):
        x, y = (i % columns) * (width + gap), (i // columns) * (head + height)
        title = _shortened(title, width, text_size)
        draw.text((x, y + head / 2), title, fill=TEXT, font=_font(text_size), anchor="lm")
        canvas.paste(Image.fromarray(picture), (x, y + head))
    return np.asarray(canvas)


def draw_boxes(picture: np.ndarray, regions: Sequence[Region], line_width: int) -> np.ndarray:
    """Draws frames around regions, in the colour that says which prediction is right there.

    Args:
        picture: (H, W, 3) uint8, RGB.
        regions: what to frame.
        line_width: in pixels; a dark edge on both sides comes on top.

    Returns:
        A copy of the picture with the frames.
    """
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    edge = max(1, line_width // 3)
    for region in sorted(regions, key=lambda r: r.pixels, reverse=True):
        box = np.array([region.left, region.top, region.right - 1, region.bottom - 1])
        outward = np.array([-1, -1, 1, 1])
        draw.rectangle([*(box + edge * outward)], outline=_EDGE, width=line_width + 2 * edge)
        if region.right - region.left > 1 and region.bottom - region.top > 1:
            draw.rectangle([*box], outline=BOX_COLORS[region.better], width=line_width)
    return np.asarray(canvas)


def box_entries(regions: Sequence[Region], first: str, second: str) -> list[Entry]:
    """Legend entries of the frames that occur.

    Args:
        regions: as they are drawn.
        first, second: what the predictions are called.
    """
    names = {
        FIRST: f"{first} is right",
        SECOND: f"{second} is right",
        NEITHER: "neither is right",
        None: "they differ",
    }
    found = {region.better for region in regions}
    return [
        Entry(name, BOX_COLORS[kind], float("inf"), is_box=True)
        for kind, name in names.items()
        if kind in found
    ]


def text_size_for(height: int, width: int) -> int:
    """A size of text, in pixels, that can be read on an image of this size shown reduced."""
    return max(12, round(max(height, width) / 34))


def _that_fit(entries: Sequence[Entry], rows: int, width: int, text_size: int) -> list[Entry]:
    """The heaviest entries that fit into some rows, in their order."""
    chosen: list[int] = []
    for i in sorted(range(len(entries)), key=lambda i: entries[i].weight, reverse=True):
        trial = sorted([*chosen, i])
        if len(_lines([entries[j] for j in trial], width, text_size)) > rows:
            break
        chosen = trial
    return [entries[i] for i in chosen]


def _lines(entries: Sequence[Entry], width: int, text_size: int) -> list[list[tuple[int, Entry]]]:
    """Entries with their positions along each row."""
    lines: list[list[tuple[int, Entry]]] = []
    margin = text_size // 2
    x = width
    for entry in entries:
        name = _shortened(entry.name, width - 2 * margin - _patch_width(text_size), text_size)
        needed = _patch_width(text_size) + round(_font(text_size).getlength(name))
        if not lines or x + needed > width - margin:
            lines.append([])
            x = margin
        lines[-1].append((x, entry._replace(name=name)))
        x += needed + text_size
    return lines


def _draw_entry(draw: ImageDraw.ImageDraw, entry: Entry, x: int, y: int, text_size: int) -> None:
    height = _row_height(text_size)
    top = y + (height - text_size) // 2
    patch = (x, top, x + round(1.2 * text_size), top + text_size - 1)
    if entry.is_box:
        line = max(2, text_size // 6)
        draw.rectangle(patch, outline=_EDGE, width=line + 2)
        inner = (patch[0] + 1, patch[1] + 1, patch[2] - 1, patch[3] - 1)
        draw.rectangle(inner, outline=entry.color, width=line)
    else:
        draw.rectangle(patch, fill=entry.color, outline="#9a9a9a")
    position = (x + _patch_width(text_size), y + height / 2)
    draw.text(position, entry.name, fill=TEXT, font=_font(text_size), anchor="lm")


def _shortened(text: str, width: float, text_size: int) -> str:
    font = _font(text_size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _row_height(text_size: int) -> int:
    return round(1.6 * text_size)


def _patch_width(text_size: int) -> int:
    return round(1.6 * text_size)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib brings it, whatever fonts the system has.
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)
