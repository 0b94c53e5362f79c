"""Reports in a headless Chromium, opened from disk: on a laptop and a phone, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contrast_d2.data.check import check_dataset
from contrast_d2.studio.ablation import write_page
from contrast_d2.studio.dataset_report import write_report
from contrast_d2.studio.html_page import html_page

from .browser import LAPTOP, PHONE, browser, opened, overflow  # noqa: F401  (a fixture)
from .studio.ablation.made import made_page as made_ablation
from .studio.embeddings.made import COLORS, made_page

ROOT = Path(__file__).parents[1]


def write_check(path: Path) -> None:
    """The check of a folder that has faults, files with long names among them."""
    folder = path.parent / "yard"
    for part in ("images", "annotations"):
        (folder / part / "train").mkdir(parents=True)
    for name in ("a", "b" * 90):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/train/{name}.png")
        Image.fromarray(np.full((40, 600), 7, np.uint8)).save(
            folder / f"annotations/train/{name}.png"
        )
    classes = [{"name": "road" * 12, "color": [1, 2, 3]}, {"name": "car", "color": [4, 5, 6]}]
    (folder / "dataset.json").write_text(json.dumps({"classes": classes}))
    checked = check_dataset(str(folder))
    assert checked.has_errors
    write_report(str(path), checked, "yard")


REPORTS: dict[str, Callable[[Path], Any]] = {
    "ablation": made_ablation,
    "check": write_check,
    "embeddings": made_page,
}


@pytest.fixture(scope="module", params=list(REPORTS))
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    REPORTS[request.param](path)
    return path


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_report_opens_from_disk(browser, report: Path, size, dark: bool) -> None:  # noqa: F811
    with opened(browser, report, size, dark=dark) as seen:
        assert seen.page.locator("h1").is_visible()
        assert overflow(seen.page) == 0
        back = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        levels = [int(level) for level in back.removeprefix("rgb(").rstrip(")").split(",")]
        assert max(levels) < 64 if dark else min(levels) > 192
        broken = "[...document.images].filter((image) => !image.naturalWidth).length"
        assert seen.page.evaluate(broken) == 0 < seen.page.evaluate("document.images.length")
        # Text is of a size that a phone need not magnify.
        body = seen.page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")
        assert body >= 14
    assert seen.messages == [] and seen.requests == []


@pytest.mark.parametrize("name", [f"camvid_table{table}_cpu" for table in ("1a", "3", "7a")])
def test_a_table_of_variants_fits_on_a_laptop(browser, tmp_path: Path, name: str) -> None:  # noqa: F811
    result = json.loads((ROOT / f"results/{name}.json").read_text())
    write_page(tmp_path / "report.html", result)
    with opened(browser, tmp_path / "report.html") as seen:
        widths = "(table) => [table.scrollWidth, table.parentElement.clientWidth]"
        table, room = seen.page.locator("table.results").evaluate(widths)
    assert 600 < table <= room


def test_what_is_loaded_from_elsewhere_is_refused(browser, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "page.html"
    path.write_text(html_page("a", ['<img src="http://localhost:9/x.png"><p>b</p>']))
    with opened(browser, path) as seen:
        assert overflow(seen.page) == 0
    assert any("Content Security Policy" in text for text in seen.messages)


@pytest.fixture
def studio(browser, tmp_path: Path):  # noqa: F811
    """The page of embeddings on a laptop, ready, with the pixels that it shows."""
    path = tmp_path / "page.html"
    pixels, _ = made_page(path)
    with opened(browser, path) as seen:
        seen.page.wait_for_selector("body[data-ready]")
        yield seen, pixels
    assert seen.messages == [] and seen.requests == []


def place(page: Any, canvas: int, point: int) -> tuple[float, float]:
    """Where a point is on the screen."""
    target = page.locator("canvas.plane").nth(canvas)
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    x, y = page.evaluate(f"placeOf(canvases[{canvas}], {point})")
    return box["x"] + x, box["y"] + y


def color_at(page: Any, canvas: int, point: int) -> list[int]:
    """RGB of a plane's canvas in the middle of a point."""
    # Read off a copy: the browser warns of canvases that are drawn to be read.
    return page.evaluate(
        """([canvas, point]) => {
          const copy = document.createElement("canvas").getContext("2d");
          copy.drawImage(canvases[canvas], ...placeOf(canvases[canvas], point), 1, 1, 0, 0, 1, 1);
          return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }""",
        [canvas, point],
    )


def alone(page: Any) -> int:
    """A point that no other one covers, on the first canvas."""
    return page.evaluate(
        """data.label.findIndex((_, i) => data.label.every((_, j) => {
          const [a, b] = placeOf(canvases[0], i), [c, d] = placeOf(canvases[0], j);
          return i === j || Math.hypot(a - c, b - d) > 12;
        }))"""
    )


def test_a_point_shows_its_patch(studio) -> None:
    seen, pixels = studio
    page = seen.page
    point = alone(page)
    assert page.locator("#details canvas").is_hidden()
    page.mouse.move(*place(page, 0, point))
    assert page.evaluate("chosen") == point
    assert page.locator("#details .hint").is_hidden()
    # Names are shown as they are.
    lines = page.locator("#details .lines > div").all_inner_texts()
    assert lines[0].strip() == ["road", "<b>car</b>", "sky"][pixels.labels[point]]
    assert lines[2].startswith("</script><script>throw 1: neighbours ")
    x, y = pixels.position[point]
    name = f"{pixels.image[point]}/<i>{pixels.image[point]}.png"
    assert lines[3] == f"{name}, x {x}, y {y}"
    read = "document.querySelector('#details canvas').getContext('2d').getImageData(20, 96, 1, 1)"
    found = page.evaluate(f"[...{read}.data].slice(0, 3)")
    np.testing.assert_allclose(found, pixels.patches[point, 0, 0], atol=12)


def test_classes_are_switched_off_and_on(studio) -> None:
    seen, pixels = studio
    page = seen.page
    point = alone(page)
    k = int(pixels.labels[point])
    own = list(COLORS[k])
    assert color_at(page, 0, point) == own
    button = page.locator(f"button[data-class='{k}']")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert color_at(page, 0, point) != own
    page.mouse.move(*place(page, 0, point))
    assert page.evaluate("chosen") == -1
    page.locator("button[data-all='true']").click()
    assert color_at(page, 0, point) == own
    page.locator("button[data-all='false']").click()
    assert color_at(page, 0, point) != own


def test_another_plane_moves_the_points(studio) -> None:
    page = studio[0].page
    before = page.evaluate("placeOf(canvases[1], 3)")
    page.locator("button[data-plane='pca']").click()
    assert page.evaluate("placeOf(canvases[1], 3)") != before
    assert color_at(page, 1, page.evaluate("data.order.at(-1)")) in [list(c) for c in COLORS]


def test_a_tap_on_a_phone(browser, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "page.html"
    made_page(path)
    with opened(browser, path, PHONE) as seen:
        page = seen.page
        page.wait_for_selector("body[data-ready]")
        canvases = [page.locator("canvas.plane").nth(i).bounding_box() for i in (0, 1)]
        # One below the other, as wide as the screen.
        assert canvases[1]["y"] > canvases[0]["y"] + canvases[0]["height"]
        assert canvases[0]["width"] > 0.85 * PHONE[0]
        point = alone(page)
        page.touchscreen.tap(*place(page, 0, point))
        assert page.evaluate("chosen") == point
        details = page.locator("#details").bounding_box()
        assert details["y"] + details["height"] <= PHONE[1] + 1  # to be seen without scrolling
