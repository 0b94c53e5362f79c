"""A headless Chromium in which tests open pages from disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LAPTOP, PHONE = (1280, 800), (390, 844)


class OpenPage(NamedTuple):
    """A page in the browser.

    Attributes:
        page: Playwright's page.
        messages: errors and warnings of its console and its scripts, so far.
        requests: addresses that it has asked for, besides its own and those of data within it.
    """

    page: Any
    messages: list[str]
    requests: list[str]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Playwright's browser; skips where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox does not work for root.
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@contextmanager
def opened(
    browser: Any, file: Path, size: tuple[int, int] = LAPTOP, *, dark: bool = False
) -> Iterator[OpenPage]:
    """Opens a file; narrow screens are those of phones, with touch and two pixels to a point.

    Args:
        browser: the fixture.
        file: an HTML file.
        size: width and height in CSS pixels.
        dark: whether the reader prefers a dark screen.
    """
    phone = size[0] < 600
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        is_mobile=phone,
        has_touch=phone,
        device_scale_factor=2 if phone else 1,
    )
    page = context.new_page()
    seen = OpenPage(page, [], [])
    address = file.resolve().as_uri()
    page.on("console", lambda m: m.type in ("error", "warning") and seen.messages.append(m.text))
    page.on("pageerror", lambda error: seen.messages.append(str(error)))
    page.on(
        "request",
        lambda r: r.url == address or r.url.startswith("data:") or seen.requests.append(r.url),
    )
    page.goto(address)
    page.wait_for_load_state("networkidle")
    try:
        yield seen
    finally:
        context.close()


def overflow(page: Any) -> int:
    """By how many CSS pixels a page is wider than the screen."""
    return page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
