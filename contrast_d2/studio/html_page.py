"""Reports as one HTML file that needs nothing else: no network, no folder of pictures.

A page forbids itself to load anything but what it holds, follows the reader's choice of a light or
dark screen, and fits a phone: text wraps, and what cannot wrap goes into `wide`, which scrolls.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

# What is not named here the browser refuses, whatever a name in the data makes of the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { --text: #222; --muted: #666; --back: #fff; --panel: #f3f3f3; --line: #ccc; --mark: #0072B2 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --muted: #a0a0a0; --back: #17181a; --panel: #26282b; --line: #4a4d52;
    --mark: #56B4E9 }
}
html { color-scheme: light dark; -webkit-text-size-adjust: 100% }
body { font: 15px/1.45 sans-serif; color: var(--text); background: var(--back); max-width: 66em;
  margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere }
h1 { line-height: 1.2 } img { max-width: 100% } code { background: var(--panel) }
table { border-collapse: collapse; overflow-wrap: normal } td, th { padding: .15em .6em;
  text-align: right } th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto } .figure { min-width: 42em } .muted, figcaption { color: var(--muted) }
figure { display: inline-block; margin: .5em 1em .5em 0; max-width: 100% }
"""

escape = html.escape


def html_page(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: its name and heading, plain text.
        body: HTML that follows the heading, in parts. Text in it has to be escaped already.
        style: CSS, besides what all pages have. Colours are `--text`, `--muted`, `--back`,
            `--panel`, `--line` and `--mark`.
        script: JavaScript, run after the page has been read.

    Returns:
        HTML, for a file in UTF-8.
    """
    return "\n".join(_document(title, body, style, script))


def _document(title: str, body: Iterable[str], style: str, script: str) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>"
    yield f"<body><h1>{escape(title)}</h1>"
    yield from body
    if script:
        yield f'<script>"use strict";{script}</script>'
    yield "</body></html>"


def wide(content: str) -> str:
    """Lets a table scroll on its own where it is wider than the screen."""
    return f'<div class="wide">{content}</div>'


def wide_picture(address: str, text: str) -> str:
    """A figure with small print, which scrolls on its own on a screen that would make it too small.

    Args:
        address: for `src`.
        text: what is seen on it, for those who do not.
    """
    return wide(f'<div class="figure"><img src="{address}" alt="{escape(text)}"></div>')


def jpeg_address(image: Image.Image, quality: int = 85) -> str:
    """A picture as a JPEG within an address, for `src`.

    Args:
        image: RGB or grey.
        quality: of the JPEG, 1..95.
    """
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return _address("jpeg", buffer.getvalue())


def png_address(content: bytes) -> str:
    """The content of a PNG file within an address, for `src`."""
    return _address("png", content)


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def json_block(identifier: str, data: Any) -> str:
    """Data for a page's script, which reads it as `JSON.parse` of the element's `textContent`.

    Args:
        identifier: of the element.
        data: what JSON can hold, without nan.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # A name that holds "</script>" or "<!--" must not end the element.
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(identifier)}">{text}</script>'
