"""A small set of pixels with two models, and what is found of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from contrast_d2.studio.embeddings import (
    ModelStudy,
    PixelSet,
    label_suspects,
    plot_class_similarity,
    study_model,
    write_page,
)

NAMES = ["road", "<b>car</b>", "sky"]
COLORS = [(128, 64, 128), (0, 0, 142), (70, 130, 180)]
MODELS = ["baseline", "</script><script>throw 1"]


def made_pixels(count: int = 60) -> PixelSet:
    """Pixels of 3 classes and 6 images, whose patches have the colour of their number."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 3, count))
    vectors = {name: np.eye(3, 8)[labels] + 0.7 * rng.normal(size=(count, 8)) for name in MODELS}
    patches = np.zeros((count, 12, 12, 3), np.uint8)
    patches[..., 0] = (4 * np.arange(count))[:, None, None]
    patches[..., 1] = 255 - patches[..., 0]
    return PixelSet(
        embeddings={name: v.astype(np.float32) for name, v in vectors.items()},
        predictions={name: rng.integers(0, 3, count) for name in MODELS},
        labels=labels,
        image=np.arange(count) % 6,
        position=rng.integers(0, 900, (count, 2)),
        one_class=np.ones(count, bool),
        patches=patches,
        file_names=tuple(f"/data/part/{i}/<i>{i}.png" for i in range(6)),
    )


def made_studies(pixels: PixelSet) -> dict[str, ModelStudy]:
    """Both models, with principal components; t-SNE is stood for by the same, turned."""
    studies = {}
    for name in MODELS:
        study = study_model(
            pixels.embeddings[name],
            pixels.predictions[name],
            pixels.labels,
            pixels.image,
            num_classes=3,
            neighbours=5,
            apart=1,
            planes=["pca"],
            seed=0,
        )
        planes = {"tsne": study.planes["pca"][:, ::-1] * (1, -1), **study.planes}
        studies[name] = study._replace(planes=planes)
    return studies


def made_page(path: Path, most_points: int = 1000) -> tuple[PixelSet, dict[str, ModelStudy]]:
    """Writes the page of both models."""
    pixels = made_pixels()
    studies = made_studies(pixels)
    votes = [study.votes for study in studies.values()]
    picture = io.BytesIO()
    matrices = {name: study.class_similarity for name, study in studies.items()}
    plot_class_similarity(matrices, NAMES).savefig(picture, format="png")
    write_page(
        path,
        pixels,
        studies,
        label_suspects(votes, pixels.labels, pixels.one_class, 5),
        class_names=NAMES,
        colors=COLORS,
        title="a & b",
        note="60 pixels",
        similarity_png=picture.getvalue(),
        most_points=most_points,
    )
    return pixels, studies
