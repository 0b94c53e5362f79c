"""What a check of a dataset found, as one HTML file with pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from ..data.check.facts import PairFacts, label_values, open_image
from ..data.check.findings import counted
from ..data.check.label_rules import LabelScheme, value_counts
from ..data.check.report import of_split, split_line, totals
from ..data.check.run import CheckedDataset
from ..data.classes import Color
from ..data.reading import READ_ERRORS
from .html_page import escape, html_page, jpeg_address, wide

_MOST_PICTURES_PER_FINDING, _MOST_PICTURES = 6, 30
_PICTURE_WIDTH = 480
_STYLE = """
.bar { background: var(--mark); height: .8em }
.finding { border-left: .4em solid #999; padding: .2em 1em; margin: 1em 0 }
.error { border-color: #D55E00 } .warning { border-color: #E69F00 }
figure img { margin-right: .4em }
"""


def write_report(path: str, checked: CheckedDataset, title: str) -> None:
    """Writes one file that holds everything: findings, pictures and the share of each class.

    Args:
        path: of the HTML file.
        checked: by `check_dataset`.
        title: heading.

    Raises:
        OSError: if the file cannot be written.
    """
    text = html_page(title, _body(checked), style=_STYLE)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _body(checked: CheckedDataset) -> Iterator[str]:
    yield f"<p>{totals(checked.findings)}.</p><ul>"
    for split in checked.splits:
        yield f"<li>{escape(split_line(split, of_split(checked, split)))}</li>"
    yield "</ul><h2>Findings</h2>"
    yield from _findings_html(checked)
    yield "<h2>Classes</h2>"
    yield wide("".join(_histogram(checked)))


def _findings_html(checked: CheckedDataset) -> Iterator[str]:
    by_file: dict[str, PairFacts] = {}
    for pair in checked.pairs:
        by_file[pair.image_file] = pair
        by_file[pair.label_file] = pair
    left = _MOST_PICTURES
    for finding in checked.findings:
        severity = finding.severity.value
        yield f'<div class="finding {severity}"><b>{severity}</b> {escape(finding.text)}'
        if finding.fix:
            yield f"<p>{escape(finding.fix)}</p>"
        if finding.files:
            paths = "<br>".join(escape(path) for path in finding.files)
            yield f"<details><summary>{counted(len(finding.files), 'file')}</summary>"
            yield f"<code>{paths}</code></details>"
        # Each pair once, though a finding may name its image and its labels.
        pairs = [by_file[path] for path in finding.files if path in by_file]
        shown = list({pair.image_file: pair for pair in pairs}.values())
        for pair in shown[: min(left, _MOST_PICTURES_PER_FINDING)]:
            left -= 1
            yield from _figure(pair, checked.scheme)
        yield "</div>"


def _figure(pair: PairFacts, scheme: LabelScheme) -> Iterator[str]:
    """The image, the boundaries of its labels on it, and these where they would fit better."""
    name = escape(pair.label_file or pair.image_file)
    try:
        image = ImageOps.exif_transpose(open_image(pair.image_file)).convert("RGB")
        pictures = [image, *_label_pictures(pair, image, scheme)]
    except READ_ERRORS as error:
        yield f"<figure><figcaption>{name}: {escape(str(error))}</figcaption></figure>"
        return
    yield (
        "<figure>" + "".join(map(_picture, pictures)) + f"<figcaption>{name}</figcaption></figure>"
    )


def _label_pictures(
    pair: PairFacts, image: Image.Image, scheme: LabelScheme
) -> Iterator[Image.Image]:
    if not pair.label_file:
        return
    stored = open_image(pair.label_file)
    values = label_values(stored)
    if values is None or values.shape != (image.height, image.width):
        yield stored.convert("RGB")
        return
    yield _outlined(image, values, scheme)
    alignment = pair.alignment
    if alignment and alignment.lead > 0:
        yield _outlined(image, np.roll(values, alignment.shift, (0, 1)), scheme)


def _outlined(image: Image.Image, values: np.ndarray, scheme: LabelScheme) -> Image.Image:
    """The boundaries of labels over their image, each side in the colour of its class.

    Boundaries rather than areas: beneath a painted area it cannot be seen where the object ends.
    """
    ends = np.zeros(values.shape, dtype=bool)
    for axis in (0, 1):
        # Two pixels to both sides, to be seen when the picture is reduced.
        for shift in (-2, -1, 1, 2):
            ends |= np.roll(values, shift, axis) != values
    pixels = np.array(image)
    pixels[ends] = _paint(values[ends], scheme)
    return Image.fromarray(pixels)


def _paint(values: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """(N,) label values to (N, 3) uint8 RGB; white for void and what is unknown."""
    found, index = np.unique(values, return_inverse=True)
    return np.array([_color(int(v), scheme) for v in found], np.uint8).reshape(-1, 3)[index]


def _color(value: int, scheme: LabelScheme) -> Color:
    k = scheme.id_to_class.get(value)
    return (255, 255, 255) if k is None or k >= len(scheme.colors) else scheme.colors[k]


def _picture(image: Image.Image) -> str:
    image.thumbnail((_PICTURE_WIDTH, 4 * _PICTURE_WIDTH))
    return f'<img src="{jpeg_address(image)}" alt="">'


def _histogram(checked: CheckedDataset) -> Iterator[str]:
    """A table: for each class its share of the pixels of each split, as a bar too."""
    scheme = checked.scheme
    shares = {}
    for split in checked.splits:
        pixels, _ = value_counts(of_split(checked, split))
        total = max(1, sum(pixels.values()))
        shares[split] = defaultdict(float)
        for value, count in pixels.items():
            k = scheme.id_to_class.get(value, -1 if value in scheme.void_ids else -2)
            shares[split][k] += count / total
    heads = "".join(f"<th>{escape(split)}</th><th></th>" for split in checked.splits)
    yield f"<p>Share of all pixels.</p><table><tr><th>class</th>{heads}</tr>"
    rows = [*enumerate(scheme.names), (-1, "(void)"), (-2, "(neither)")]
    for k, name in rows:
        if k == -2 and not any(shares[split][k] for split in checked.splits):
            continue
        cells = ""
        for split in checked.splits:
            share = shares[split][k]
            bar = f'<div class="bar" style="width:{8 * share:.3f}em"></div>'
            cells += f"<td>{share:.3%}</td><td>{bar}</td>"
        yield f"<tr><td>{escape(name)}</td>{cells}</tr>"
    yield "</table>"
