"""The built-in ``shapes`` dataset: small scenes of textured shapes, rendered on demand.

Nothing lies on disk. ``shapes://train/00017/image.png`` and ``.../label.png`` are rendered when
they are opened through detectron2's PathManager, so everything that reads images by that way works.
A scene is a function of split and index alone.

The scenes have what makes contrast useful: shapes whose colour and texture only hint at the class,
small and thin objects, and classes of which each is rarer than the one before.

H, W: 96, 128, the scenes' height and width.
"""

from __future__ import annotations

import colorsys
import functools
import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from .labels import IGNORE_LABEL as VOID_ID

HEIGHT, WIDTH = 96, 128
NUM_IMAGES = {"train": 256, "val": 64}

PREFIX = "shapes://"
_PATH = re.compile(r"(?P<split>train|val)/(?P<index>\d{5})/(?P<kind>image|label)\.png")

# How often an object takes its class's own colour or texture; otherwise both are arbitrary.
_OWN_HUE, _OWN_TEXTURE = 0.85, 0.8
_VISIBLE_ENOUGH = 0.4

Mask = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


# ------------------------------------------------------------------------------------------------
# The shapes: (H, W) bool from coordinates x, y around the object's centre, in pixels, and its size
# r. Formulas rather than a drawing library, whose rasterisation may change between versions.


def _disc(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return x * x + y * y <= r * r


def _square(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) <= 0.85 * r


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(y, abs(x) * math.sqrt(0.75) - y / 2) <= 0.6 * r


def _ring(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    square = x * x + y * y
    return (square <= r * r) & (square >= (0.55 * r) ** 2)


def _cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    x, y = abs(x), abs(y)
    return (np.maximum(x, y) <= r) & (np.minimum(x, y) <= 0.3 * r)


def _pole(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return (abs(x) <= 1.3) & (abs(y) <= r)


def _star(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    # Folded into the tenth between a tip at angle 0 and a notch at pi / 5, the star is the near
    # side of one straight edge.
    fifth = math.pi / 5
    angle = abs((np.arctan2(y, x) + fifth) % (2 * fifth) - fifth)
    radius = np.hypot(x, y)
    notch_x, notch_y = 0.45 * r * math.cos(fifth), 0.45 * r * math.sin(fifth)
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    return (notch_x - r) * v - notch_y * (u - r) >= 0


class _Kind(NamedTuple):
    """A class of objects."""

    name: str
    color: tuple[int, int, int]
    """RGB in pictures of labels; unrelated to the objects' own colours."""
    mask: Mask
    presence: float
    """Probability that a scene holds the class."""
    most: int
    """Largest number of objects in one scene that holds the class."""
    size: tuple[float, float]
    """Range of r in pixels."""
    tilt: float
    """Largest rotation in radians."""
    hue: float
    """The class's own hue, 0..1."""
    texture: int
    """The class's own texture, an index into ``_TEXTURES``."""


# In contiguous order after the background: each class rarer than the one before. Two classes share
# each hue, so that even objects in their own colour need their shape to be told apart.
_KINDS = (
    _Kind("disc", (230, 25, 75), _disc, 0.85, 2, (11, 21), 0.0, 0.02, 0),
    _Kind("square", (60, 180, 75), _square, 0.65, 2, (10, 19), 0.8, 0.02, 1),
    _Kind("triangle", (255, 225, 25), _triangle, 0.50, 2, (12, 21), 3.1, 0.33, 2),
    _Kind("ring", (0, 130, 200), _ring, 0.45, 2, (10, 16), 0.0, 0.33, 3),
    _Kind("cross", (245, 130, 48), _cross, 0.38, 2, (10, 16), 0.8, 0.58, 0),
    _Kind("pole", (145, 30, 180), _pole, 0.30, 3, (18, 36), 0.3, 0.58, 1),
    _Kind("star", (70, 240, 240), _star, 0.20, 2, (9, 14), 0.6, 0.83, 2),
    _Kind("dot", (240, 50, 230), _disc, 0.09, 3, (2.2, 3.2), 0.0, 0.83, 3),
)

CLASS_NAMES = ("background", *(kind.name for kind in _KINDS))
CLASS_COLORS = ((60, 60, 60), *(kind.color for kind in _KINDS))


# ------------------------------------------------------------------------------------------------
# Textures: (H, W) in 0..1 from pixel coordinates, blending an object's two colours.


def _plain(x: np.ndarray, y: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return np.full_like(x, rng.uniform(0, 0.3))


def _stripes(x: np.ndarray, y: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    angle, wavelength = rng.uniform(0, math.pi), rng.uniform(4, 7)
    along = x * math.cos(angle) + y * math.sin(angle)
    return 0.5 + 0.5 * np.sin(2 * math.pi * along / wavelength)


def _checks(x: np.ndarray, y: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    wavelength = rng.uniform(5, 9)
    waves = np.sin(2 * math.pi * x / wavelength) * np.sin(2 * math.pi * y / wavelength)
    return (waves > 0).astype(x.dtype)


def _speckles(x: np.ndarray, y: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return (rng.random_sample(x.shape) > 0.6).astype(x.dtype)


_TEXTURES = (_plain, _stripes, _checks, _speckles)


def _palette(rng: np.random.RandomState, hue: float, saturation: tuple[float, float]) -> np.ndarray:
    """Two colours around a hue, a light and a dark one, (2, 3) in 0..255."""
    light = rng.uniform(0.7, 1.0), rng.uniform(0.25, 0.55)
    shade = rng.uniform(*saturation)
    hues = hue, hue + rng.uniform(-0.08, 0.08)
    colors = [colorsys.hsv_to_rgb(h % 1, shade, v) for h, v in zip(hues, light, strict=True)]
    return 255 * np.array(colors)


def _paint(blend: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Blends two colours, (2, 3), by weights (H, W) to (H, W, 3)."""
    return colors[0] + blend[:, :, None] * (colors[1] - colors[0])


# ------------------------------------------------------------------------------------------------
# Scenes


class Scene(NamedTuple):
    """A rendered scene."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    label: np.ndarray
    """(H, W) uint8, class ids 0..8 and 255 on the outlines of objects."""


# An image and its label are usually read one after the other.
@functools.lru_cache(maxsize=4)
def render_scene(split: str, index: int) -> Scene:
    """Renders one scene.

    Args:
        split: "train" or "val".
        index: 0 <= index < NUM_IMAGES[split].

    Returns:
        The scene; its arrays are shared and must not be written.

    Raises:
        ValueError: if there is no such scene.
    """
    if split not in NUM_IMAGES or not 0 <= index < NUM_IMAGES[split]:
        raise ValueError(
            f"There is no shapes scene {split}/{index}: splits and their sizes are {NUM_IMAGES}"
        )
    # RandomState, because numpy freezes its streams for good; those of Generator may change.
    rng = np.random.RandomState([*split.encode(), index])
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    canvas = _background(x, y, rng)
    label = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for class_id, size in _objects(rng):
        kind = _KINDS[class_id - 1]
        mask = _place(kind, size, label, x, y, rng)
        own_texture = rng.uniform() < _OWN_TEXTURE
        texture = _TEXTURES[kind.texture if own_texture else rng.randint(len(_TEXTURES))]
        own_hue = rng.uniform() < _OWN_HUE
        hue = kind.hue + 0.04 * rng.standard_normal() if own_hue else rng.uniform()
        canvas[mask] = _paint(texture(x, y, rng), _palette(rng, hue, (0.5, 0.95)))[mask]
        # Only pixels outside are void: an outline on the inside would swallow poles and dots.
        label[_dilated(mask) & ~mask] = VOID_ID
        label[mask] = class_id
    image = _softened(canvas) * rng.uniform(0.75, 1.1)
    image += rng.uniform(2, 9) * rng.standard_normal(image.shape)
    scene = Scene(np.clip(image, 0, 255).astype(np.uint8), label)
    for array in scene:
        array.setflags(write=False)
    return scene


def _objects(rng: np.random.RandomState) -> list[tuple[int, float]]:
    """Draws the objects of a scene: (class id, size), the largest first, so that it lies behind."""
    objects = []
    for class_id, kind in enumerate(_KINDS, start=1):
        if rng.uniform() < kind.presence:
            count = rng.randint(1, kind.most + 1)
            objects += [(class_id, rng.uniform(*kind.size)) for _ in range(count)]
    # A pole is long, but thin: nothing but dots may hide it.
    return sorted(objects, key=lambda o: -o[1] if _KINDS[o[0] - 1].mask is not _pole else -4)


def _place(
    kind: _Kind,
    size: float,
    label: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    rng: np.random.RandomState,
) -> np.ndarray:
    """Draws where an object lies, preferring free ground, and returns its (H, W) bool mask."""
    best, best_free = np.zeros(label.shape, dtype=bool), -1.0
    for _ in range(4):
        tilt = rng.uniform(-kind.tilt, kind.tilt)
        dx, dy = x - rng.uniform(4, WIDTH - 4), y - rng.uniform(4, HEIGHT - 4)
        cos, sin = math.cos(tilt), math.sin(tilt)
        mask = kind.mask(cos * dx + sin * dy, cos * dy - sin * dx, size)
        free = float((label[mask] == 0).mean()) if mask.any() else 0.0
        if free > best_free:
            best, best_free = mask, free
        if free >= _VISIBLE_ENOUGH:
            break
    return best


def _background(x: np.ndarray, y: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Two textures that meet at a wavy line, (H, W, 3) float in 0..255."""
    height = HEIGHT * rng.uniform(0.2, 0.8)
    wave = rng.uniform(2, 10) * np.sin(2 * math.pi * x / rng.uniform(40, 120) + rng.uniform(0, 6))
    layers = []
    for _ in range(2):
        texture = _TEXTURES[rng.randint(len(_TEXTURES))]
        blend = 0.6 * texture(x, y, rng) + 0.4 * _clouds(rng)
        layers.append(_paint(blend, 0.8 * _palette(rng, rng.uniform(), (0.05, 0.4))))
    return np.where((y + wave > height)[:, :, None], *layers)


def _clouds(rng: np.random.RandomState) -> np.ndarray:
    """Smooth noise, (H, W) in 0..1: a coarse random grid, interpolated."""
    coarse = rng.random_sample((5, 6))
    rows = np.linspace(0, 4, HEIGHT)
    columns = np.linspace(0, 5, WIDTH)
    return _interpolation(rows, 5) @ coarse @ _interpolation(columns, 6).T


def _interpolation(positions: np.ndarray, size: int) -> np.ndarray:
    """Weights of linear interpolation, (len(positions), size)."""
    return np.maximum(0, 1 - abs(positions[:, None] - np.arange(size)))


def _dilated(mask: np.ndarray) -> np.ndarray:
    """A mask grown by one pixel in the four directions."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _softened(canvas: np.ndarray) -> np.ndarray:
    """Blurs an image slightly, so that edges look photographed."""
    for axis in (0, 1):
        neighbours = np.roll(canvas, 1, axis) + np.roll(canvas, -1, axis)
        canvas = 0.6 * canvas + 0.2 * neighbours
    return canvas


# ------------------------------------------------------------------------------------------------
# The dataset


def load_shapes(split: str) -> list[dict[str, Any]]:
    """Lists the scenes of a split in detectron2's dataset format.

    Args:
        split: "train" or "val".

    Returns:
        One record per scene, with ``file_name``, ``sem_seg_file_name``, ``height``, ``width`` and
        ``image_id``.
    """
    return [
        {
            "file_name": f"{PREFIX}{split}/{index:05d}/image.png",
            "sem_seg_file_name": f"{PREFIX}{split}/{index:05d}/label.png",
            "image_id": f"{split}_{index:05d}",
            "height": HEIGHT,
            "width": WIDTH,
        }
        for index in range(NUM_IMAGES[split])
    ]


class ShapesPathHandler(PathHandler):
    """Serves ``shapes://SPLIT/INDEX/image.png`` and ``.../label.png`` as PNG files, read-only."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> io.BytesIO:
        self._check_kwargs(kwargs)
        if mode != "rb":
            raise ValueError(f"{path} can only be opened with mode 'rb', got {mode!r}")
        match = _PATH.fullmatch(path[len(PREFIX) :])
        if match is None:
            raise FileNotFoundError(
                f"No such file: {path}. Names are like {PREFIX}train/00017/image.png or label.png"
            )
        scene = render_scene(match["split"], int(match["index"]))
        file = io.BytesIO()
        array = scene.image if match["kind"] == "image" else scene.label
        Image.fromarray(array).save(file, format="PNG", compress_level=1)
        file.seek(0)
        return file

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        match = _PATH.fullmatch(path[len(PREFIX) :])
        return match is not None and int(match["index"]) < NUM_IMAGES[match["split"]]

    _exists = _isfile


PathManager.register_handler(ShapesPathHandler())
