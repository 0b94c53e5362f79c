from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from contrast_d2.studio.compositing import (
    BOX_COLORS,
    Entry,
    blend,
    box_entries,
    class_entries,
    draw_boxes,
    palette_image,
    panels,
    with_legend,
)
from contrast_d2.studio.differences import FIRST, NEITHER, SECOND, Region
from contrast_d2.studio.visualize import overlay

NAMES = ["road", "sky", "car", "person"]
COLORS = [(128, 64, 128), (70, 130, 180), (0, 0, 142), (220, 20, 60)]


def has_color(picture: np.ndarray, color) -> bool:
    return bool((picture == color).all(axis=-1).any())


def rgb(color: str) -> tuple[int, ...]:
    return tuple(round(255 * value) for value in to_rgb(color))


def test_a_palette_image_holds_the_ids_and_shows_the_colours(tmp_path) -> None:
    ids = np.array([[0, 1], [3, 2]], dtype=np.uint8)
    palette_image(ids, COLORS).save(tmp_path / "ids.png")
    with Image.open(tmp_path / "ids.png") as image:
        assert np.asarray(image).tolist() == ids.tolist()
        assert np.asarray(image.convert("RGB"))[1].tolist() == [list(COLORS[3]), list(COLORS[2])]


def test_blend_is_the_overlay_of_maps_without_ignored_pixels(subtests: pytest.Subtests) -> None:
    for opacity in [0.0, 0.3, 1.0]:
        with subtests.test(opacity=opacity):
            generator = np.random.default_rng(0)
            image = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            ids = generator.integers(0, 4, (20, 30), dtype=np.uint8)
            expected = overlay(image, ids, COLORS, alpha=opacity).astype(int)
            assert np.abs(blend(image, ids, COLORS, opacity) - expected).max() <= 1


def test_the_legend_holds_the_classes_that_occur() -> None:
    maps = [np.array([[0, 0, 3]], dtype=np.uint8), np.array([[0, 255, 255]], dtype=np.uint8)]
    entries = class_entries(maps, NAMES, COLORS)
    assert [(e.name, e.weight) for e in entries] == [("road", 3), ("person", 1)]
    picture = np.zeros((50, 300, 3), dtype=np.uint8)
    shown = with_legend(picture, entries, text_size=12)
    assert (shown[:50] == picture).all() and shown.shape[1] == 300
    legend = shown[50:]
    assert [has_color(legend, color) for color in COLORS] == [True, False, False, True]
    assert (legend.min(axis=-1) < 100).sum() > 50  # the names


def test_a_legend_of_fixed_height_keeps_the_heaviest_entries() -> None:
    picture = np.zeros((10, 130, 3), dtype=np.uint8)
    entries = [
        Entry(f"class {i}", (i, 0, 200), weight)
        for i, weight in enumerate([5, 1, float("inf"), 2, 7])
    ]
    every = with_legend(picture, entries, text_size=12)[10:]
    fixed = with_legend(picture, entries, text_size=12, rows=2)[10:]
    empty = with_legend(picture, [], text_size=12, rows=2)[10:]
    assert fixed.shape == empty.shape and len(every) > len(fixed)
    shown = [has_color(fixed, entry.color) for entry in entries]
    assert shown[2] and shown[4] and not shown[1]
    assert all(has_color(every, entry.color) for entry in entries)


def test_no_name_is_drawn_beyond_the_picture() -> None:
    entry = Entry("a name that is far too long for a picture this narrow", (0, 0, 200), 1)
    wide = with_legend(np.zeros((5, 100, 3), dtype=np.uint8), [entry], text_size=12)[5:]
    assert (wide[:, -5:] == 255).all() and has_color(wide, entry.color)


def test_panels_lie_in_a_grid_under_their_titles() -> None:
    pictures = {n: np.full((30, 80, 3), (40 * i, 0, 200)) for i, n in enumerate("abcd")}
    pictures = {name: picture.astype(np.uint8) for name, picture in pictures.items()}
    grid = panels(pictures, text_size=12, columns=2)
    places = [np.argwhere((grid == picture[0, 0]).all(axis=-1)) for picture in pictures.values()]
    assert [len(place) for place in places] == [30 * 80] * 4
    rows, columns = np.array([place[0] for place in places]).T.tolist()
    assert 12 < rows[0] == rows[1] and rows[0] + 30 + 12 < rows[2] == rows[3]
    assert columns[0] == columns[2] == 0 and 80 < columns[1] == columns[3]
    titles = grid[: rows[0]].min(axis=-1) < 100
    assert titles[:, :80].any() and titles[:, columns[1] :].any()


def test_boxes_are_drawn_around_regions_in_the_colour_of_who_is_right() -> None:
    picture = np.full((60, 80, 3), 120, dtype=np.uint8)
    regions = [
        Region(10, 10, 30, 30, 400, FIRST),
        Region(35, 40, 55, 70, 600, SECOND),
        Region(5, 60, 6, 61, 1, NEITHER),
    ]
    drawn = draw_boxes(picture, regions, 2)
    assert (picture == 120).all()
    for region in regions[:2]:
        color = rgb(BOX_COLORS[region.better])
        rows, columns = np.nonzero((drawn == color).all(axis=-1))
        assert (rows.min(), rows.max() + 1) == (region.top, region.bottom)
        assert (columns.min(), columns.max() + 1) == (region.left, region.right)
        assert (drawn[region.top + 5 : region.bottom - 5, region.left + 5] == 120).all()
    assert len({BOX_COLORS[kind] for kind in (FIRST, SECOND, NEITHER)}) == 3
    names = [entry.name for entry in box_entries(regions, "base", "ours")]
    assert names == ["base is right", "ours is right", "neither is right"]
    assert all(entry.is_box for entry in box_entries(regions, "base", "ours"))
