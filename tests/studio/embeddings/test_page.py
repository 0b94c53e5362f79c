"""What the page of embeddings holds; how it behaves is tested in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contrast_d2.studio.embeddings import plot_class_similarity, plot_planes, short_names

from .made import COLORS, MODELS, NAMES, made_page


@pytest.fixture
def written(tmp_path: Path):
    """Text of a page with all pixels, and what was drawn on it."""
    return (tmp_path / "page.html", *made_page(tmp_path / "page.html"))


def points_of(text: str) -> dict:
    return json.loads(re.findall('<script type="application/json"[^>]*>(.*?)</script>', text)[0])


def test_points_are_the_pixels(written) -> None:
    path, pixels, studies = written
    points = points_of(path.read_text())
    assert points["label"] == pixels.labels.tolist()
    assert points["image"] == pixels.image.tolist()
    assert points["position"] == pixels.position.tolist()
    assert points["files"][2] == "2/<i>2.png"
    assert [model["name"] for model in points["models"]] == MODELS
    for model, study in zip(points["models"], studies.values(), strict=True):
        assert model["neighbours"] == study.neighbour_class.tolist()
        drawn = np.array(model["planes"]["pca"]).reshape(-1, 2)
        assert drawn.min() >= 0 and drawn.max() == 10_000
        # Distances keep their ratios.
        plane = study.planes["pca"]
        expected = (plane - plane[0]) * 10_000 / np.ptp(plane, axis=0).max()
        np.testing.assert_allclose(drawn - drawn[0], expected, atol=1.01)


def test_the_sprite_has_the_patch_of_each_point(written) -> None:
    path, pixels, _ = written
    text = path.read_text()
    content = re.findall(r'id="sprite" src="data:image/jpeg;base64,([^"]*)"', text)[0]
    sprite = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    columns = points_of(text)["columns"]
    for i in (0, 1, columns, 59):
        y, x = 12 * (i // columns), 12 * (i % columns)
        found = sprite[y + 3 : y + 9, x + 3 : x + 9].mean(axis=(0, 1))
        np.testing.assert_allclose(found, pixels.patches[i, 0, 0], atol=12)


def test_a_page_has_so_many_points_and_the_suspects(tmp_path: Path) -> None:
    pixels, _ = made_page(tmp_path / "page.html", most_points=10)
    text = (tmp_path / "page.html").read_text()
    points = points_of(text)
    suspects = [int(n) for n in re.findall(r'data-point="(\d+)"', text)]
    assert 1 <= len(suspects) <= 5 and 10 <= len(points["label"]) <= 15
    assert f"{len(points['label'])} of 60 pixels are shown" in text
    listed = re.findall("labelled <b>(.*?)</b> ", text)
    # A suspect's number is that of its point.
    names = [NAMES[points["label"][i]] for i in suspects]
    assert [name.replace("&lt;", "<").replace("&gt;", ">") for name in listed] == names


def test_names_are_text(written) -> None:
    text = written[0].read_text()
    assert "<b>car</b>" not in text and "<i>" not in text and "<script>throw" not in text
    assert "a &amp; b" in text


def test_the_folder_of_all_files_is_left_out() -> None:
    assert short_names(["/a/b/c/1.png", "/a/b/2.png"]) == ["c/1.png", "2.png"]
    assert short_names(["1.png", "x/2.png"]) == ["1.png", "x/2.png"]
    assert short_names(["/a/ab/1.png", "/a/ac/1.png"]) == ["ab/1.png", "ac/1.png"]


def test_a_figure_has_a_panel_per_model_and_the_classes_that_occur() -> None:
    planes = {name: np.random.default_rng(0).normal(size=(4, 2)) for name in "ab"}
    figure = plot_planes(planes, np.array([0, 2, 2, 0]), COLORS, NAMES, title="both")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["road (2)", "sky (2)"]
    for axes, plane in zip(figure.axes, planes.values(), strict=True):
        (dots,) = axes.collections
        placed = np.array(dots.get_offsets())
        i = np.flatnonzero((placed == plane[1]).all(axis=1))[0]
        np.testing.assert_allclose(dots.get_facecolors()[i][:3], np.array(COLORS[2]) / 255)


def test_a_legend_of_many_long_names_stays_within_the_figure() -> None:
    names = [f"a class with a long name {k}" for k in range(40)]
    labels = np.arange(40)
    planes = {"a": np.random.default_rng(0).normal(size=(40, 2))}
    figure = plot_planes(planes, labels, [(k, k, k) for k in range(40)], names)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    # The plane keeps its room.
    assert figure.axes[0].get_window_extent().height > 350


def test_similarities_share_one_scale() -> None:
    matrices = {"a": np.array([[0.9, 0.2], [0.2, np.nan]]), "b": np.full((2, 2), 0.5)}
    figure = plot_class_similarity(matrices, ["x", "y"])
    pictures = [axes.images[0] for axes in figure.axes[:2]]
    assert [picture.get_clim() for picture in pictures] == [(0.2, 0.9)] * 2
    assert [text.get_text() for text in figure.axes[0].texts] == [".90", ".20", ".20"]
