"""The parts of a page that holds everything it needs."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from contrast_d2.studio.html_page import html_page, jpeg_address, json_block


def test_a_title_is_text_and_not_html() -> None:
    page = html_page("<b>a & b</b>", ["<p>body</p>"], style="p { color: red }", script="run()")
    assert page.count("&lt;b&gt;a &amp; b&lt;/b&gt;") == 2 and "<b>" not in page
    assert page.index("color: red") < page.index("<p>body</p>") < page.index("run()")


def test_a_page_may_load_nothing() -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html_page("a", []))
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert set(rules.values()) == {"data:", "'unsafe-inline'"}


def test_data_cannot_end_their_element() -> None:
    data = {"name": "</script><img src=x>", "number": 1.5}
    block = json_block("points", data)
    assert block.count("<") == 2
    assert json.loads(re.sub("<[^>]*>", "", block)) == data
    with pytest.raises(ValueError, match="JSON compliant"):
        json_block("points", float("nan"))


def test_a_picture_comes_back() -> None:
    pixels = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    head, _, content = jpeg_address(Image.fromarray(pixels)).partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.format == "JPEG"
        np.testing.assert_allclose(np.asarray(image), pixels, atol=3)
