"""The embeddings of one or more models as one HTML file, where a point shows its image patch.

Shape letters: A pixels, K classes, P the side of a patch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..html_page import escape, html_page, jpeg_address, json_block, png_address, wide, wide_picture
from .pixels import PixelSet
from .planes import PLANE_TITLES
from .study import ModelStudy
from .suspects import Suspect

_STYLE = """
.planes { display: flex; flex-wrap: wrap; gap: 1em } .planes figure { flex: 1 1 20em; margin: 0 }
canvas.plane { width: 100%; aspect-ratio: 1; border: 1px solid var(--line); display: block;
  cursor: crosshair; touch-action: manipulation }
button { font: inherit; color: var(--text); background: var(--panel); padding: .25em .7em;
  border: 1px solid var(--line); border-radius: .3em; margin: .15em; cursor: pointer }
button[data-class][aria-pressed=false] { opacity: .45 } button[data-plane][aria-pressed=true] {
  border-color: var(--mark); box-shadow: inset 0 0 0 1px var(--mark) }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em;
  border: 1px solid var(--muted) }
#details { position: sticky; bottom: 0; display: flex; gap: 1em; align-items: center;
  background: var(--back); border-top: 1px solid var(--line); padding: .5em 0; min-height: 3em }
#details canvas { flex: none; width: 96px; height: 96px } #details canvas[hidden] { display: none }
.chosen .hint { display: none } #sprite { display: none }
.suspects { display: grid; gap: .8em; grid-template-columns: repeat(auto-fill, minmax(17em, 1fr)) }
.suspects div { display: flex; gap: .7em } .suspects p { margin: 0 }
.suspects canvas { flex: none; width: 96px; height: 96px }
"""

SCORE_TITLES = {
    "knn_miou": "kNN mIoU",
    "knn_accuracy": "kNN accuracy",
    "prototype_miou": "prototype mIoU",
    "prototype_accuracy": "prototype accuracy",
    "prediction_miou": "mIoU of the model's classes",
    "prediction_accuracy": "accuracy of the model's classes",
    "silhouette": "silhouette",
    "alignment": "alignment (lower: closer)",
    "uniformity": "uniformity (lower: more spread)",
}


def write_page(
    path: str | Path,
    pixels: PixelSet,
    studies: Mapping[str, ModelStudy],
    suspects: Sequence[Suspect],
    *,
    class_names: Sequence[str],
    colors: Sequence[Sequence[int]],
    title: str,
    note: str,
    similarity_png: bytes,
    most_points: int,
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        pixels: those that were drawn.
        studies: of each model, with the same planes, at least one.
        suspects: pixels whose label may be wrong.
        class_names: K names.
        colors: K RGB triples in 0..255.
        title: heading.
        note: what was drawn, of which data and layer.
        similarity_png: the figure of the classes' similarity.
        most_points: how many pixels the page shows, besides the suspects. Each adds about 2 kB.

    Raises:
        OSError: the file cannot be written.
    """
    shown = _shown(len(pixels.labels), suspects, most_points)
    number_of = {int(i): number for number, i in enumerate(shown)}
    points = _points(pixels, studies, shown, class_names, colors)
    sprite, points["columns"] = _sprite(pixels.patches[shown])

    def body() -> Iterator[str]:
        yield f"<p>{escape(note)}</p>"
        if len(shown) < len(pixels.labels):
            yield f"<p>{len(shown)} of {len(pixels.labels)} pixels are shown, drawn at random.</p>"
        yield wide(_score_table(studies))
        yield from _plot(pixels.labels[shown], studies, class_names, colors)
        yield "<h2>Similarity of classes</h2><p>Mean cosine similarity of two pixels.</p>"
        yield wide_picture(png_address(similarity_png), "Similarity of classes")
        yield from _suspects(suspects, number_of, pixels, class_names)
        yield f'<img id="sprite" src="{jpeg_address(sprite, quality=80)}" alt="">'
        yield json_block("points", points)

    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    Path(path).write_text(html_page(title, body(), style=_STYLE, script=script), encoding="utf-8")


def _shown(count: int, suspects: Sequence[Suspect], most: int) -> np.ndarray:
    """The pixels on the page, in ascending order."""
    drawn = np.random.default_rng(0).permutation(count)[:most]
    return np.union1d(drawn, np.array([suspect.pixel for suspect in suspects], np.int64))


def _points(
    pixels: PixelSet,
    studies: Mapping[str, ModelStudy],
    shown: np.ndarray,
    class_names: Sequence[str],
    colors: Sequence[Sequence[int]],
) -> dict:
    """What the script reads; arrays of pixels have one entry for each that is shown."""
    return {
        "names": list(class_names),
        "colors": [[int(c) for c in color] for color in colors],
        "planes": list(next(iter(studies.values())).planes),
        "patch": pixels.patches.shape[1],
        "files": short_names(pixels.file_names),
        "label": pixels.labels[shown].tolist(),
        "image": pixels.image[shown].tolist(),
        "position": pixels.position[shown].tolist(),
        "order": np.random.default_rng(0).permutation(len(shown)).tolist(),
        "models": [
            {
                "name": name,
                "neighbours": study.neighbour_class[shown].tolist(),
                "predictions": pixels.predictions[name][shown].tolist(),
                "planes": {
                    key: _grid(plane)[shown].ravel().tolist() for key, plane in study.planes.items()
                },
            }
            for name, study in studies.items()
        ],
    }


def short_names(file_names: Sequence[str]) -> list[str]:
    """Paths without the folder that all of them lie in."""
    folder = os.path.commonpath([os.path.dirname(name) for name in file_names])
    return [os.path.relpath(name, folder) if folder else name for name in file_names]


def _grid(plane: np.ndarray) -> np.ndarray:
    """Points (A, 2) as integers of 0..10000, with the sides' ratio kept."""
    low, high = plane.min(axis=0), plane.max(axis=0)
    extent = max(float((high - low).max()), 1e-12)
    return np.rint(10_000 * ((plane - (low + high) / 2) / extent + 0.5)).astype(np.int64)


def _sprite(patches: np.ndarray) -> tuple[Image.Image, int]:
    """(A, P, P, 3) patches in rows of one picture, about as wide as high, and how many to a row."""
    count, side = patches.shape[:2]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    picture = np.zeros((rows * columns, side, side, 3), np.uint8)
    picture[:count] = patches
    picture = picture.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return Image.fromarray(picture.reshape(rows * side, columns * side, 3)), columns


def _score_table(studies: Mapping[str, ModelStudy]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in studies)
    rows = ""
    for key, text in SCORE_TITLES.items():
        values = (study.scores[key] for study in studies.values())
        cells = "".join(f"<td>{value:.3f}</td>" for value in values)
        rows += f"<tr><td>{escape(text)}</td>{cells}</tr>"
    return f"<table><tr><th>on the drawn pixels</th>{heads}</tr>{rows}</table>"


def _plot(
    labels: np.ndarray,
    studies: Mapping[str, ModelStudy],
    class_names: Sequence[str],
    colors: Sequence[Sequence[int]],
) -> Iterator[str]:
    planes = next(iter(studies.values())).planes
    yield "<h2>Pixels as points</h2><p>"
    for number, plane in enumerate(planes):
        pressed = str(number == 0).lower()
        yield f'<button data-plane="{plane}" aria-pressed="{pressed}">'
        yield f"{PLANE_TITLES[plane]}</button>"
    yield '</p><p><button data-all="true">all classes</button>'
    yield '<button data-all="false">none</button>'
    for k in np.unique(labels):
        color = ",".join(str(int(c)) for c in colors[k])
        yield (
            f'<button data-class="{k}" aria-pressed="true"><span class="dot" '
            f'style="background:rgb({color})"></span>{escape(class_names[k])}</button>'  # pyright: ignore[reportArgumentType]
        )
    yield '</p><div class="planes">'
    for number, name in enumerate(studies):
        yield f'<figure><figcaption>{escape(name)}</figcaption><canvas class="plane" '
        yield f'data-model="{number}"></canvas></figure>'
    yield '</div><div id="details"><canvas width="192" height="192" hidden></canvas>'
    yield '<div><div class="hint muted">Point at a pixel, or tap it, to see it in its image.</div>'
    yield '<div class="lines"></div></div></div>'


def _suspects(
    suspects: Sequence[Suspect],
    number_of: Mapping[int, int],
    pixels: PixelSet,
    class_names: Sequence[str],
) -> Iterator[str]:
    yield "<h2>Labels that may be wrong</h2>"
    if not suspects:
        yield "<p>None: no pixel's neighbours agree on another class than its label.</p>"
        return
    yield "<p>Pixels whose neighbours in other images mostly have another class, the largest "
    yield "lead first. Most are confusions of the model: look at the patch.</p>"
    yield '<div class="suspects">'
    names = short_names(pixels.file_names)
    for suspect in suspects:
        i = suspect.pixel
        x, y = pixels.position[i]
        name = escape(names[pixels.image[i]])
        label, vote = (escape(class_names[k]) for k in (pixels.labels[i], suspect.vote))
        yield (
            f'<div><canvas width="96" height="96" data-point="{number_of[i]}"></canvas><p>'
            f"labelled <b>{label}</b> ({suspect.label_share:.0%} of the neighbours)<br>"
            f"most neighbours <b>{vote}</b> ({suspect.vote_share:.0%})<br>"
            f'<span class="muted">{name}, x {x}, y {y}</span></p></div>'
        )
    yield "</div>"
