"""Label maps that look like those of street and indoor datasets, from a seed.

Speed depends on them: how many (image, class) pairs there are and how small the rarest is decides
how many anchors are drawn, and large coherent regions decide what lies beside what in memory.

Shape letters: B images, K classes, H W a label map, R regions of one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_LABEL = 255


@dataclass(frozen=True)
class Scene:
    """What the label maps of a batch look like.

    Attributes:
        batch, height, width: B, H, W.
        num_classes: K; images show them in a long-tailed (Zipf) frequency.
        classes_per_image: how many classes an image shows, before some are hidden by others.
        stuff_per_image: how many of them are large regions that tile the image in horizontal bands,
            like road, building and sky; the others are objects in front of these.
        object_area: median area of an object in pixels.
        area_spread: standard deviation of the logarithm of the objects' areas.
        seed: of everything random.
    """

    batch: int
    height: int
    width: int
    num_classes: int
    classes_per_image: int
    stuff_per_image: int
    object_area: float
    area_spread: float
    seed: int


def draw_labels(scene: Scene) -> Tensor:
    """Draws the label maps of a batch: (B, H, W) int64, `IGNORE_LABEL` in some regions."""
    generator = torch.Generator().manual_seed(scene.seed)
    frequency = 1.0 / torch.arange(1, scene.num_classes + 1)
    images = [_draw_image(scene, frequency, generator) for _ in range(scene.batch)]
    return torch.stack(images)


def _draw_image(scene: Scene, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """(H, W) labels of one image."""
    shown = torch.multinomial(frequency, scene.classes_per_image, generator=generator)
    stuff = shown[: scene.stuff_per_image].sort().values
    objects = shown[scene.stuff_per_image :]
    rows, columns = _wavy_grid(scene, generator)
    labels = _stuff_regions(scene, stuff, rows, columns, generator)
    for label in [*objects.tolist(), IGNORE_LABEL]:
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            labels[_object_mask(scene, rows, columns, generator)] = label
    # The hood of the car that carries the camera is not annotated.
    labels[-scene.height // 32 :] = IGNORE_LABEL
    return labels


def _wavy_grid(scene: Scene, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixel coordinates (H, W) displaced by smooth noise: borders drawn in them are irregular."""
    size = (scene.height, scene.width)
    noise = torch.zeros(2, *size)
    for cell, amplitude in ((64, 12.0), (16, 3.0)):
        coarse = torch.randn(
            1, 2, scene.height // cell + 2, scene.width // cell + 2, generator=generator
        )
        noise += amplitude * F.interpolate(coarse, size, mode="bicubic", align_corners=True)[0]
    rows = torch.arange(scene.height)[:, None] + noise[0]
    columns = torch.arange(scene.width)[None, :] + noise[1]
    return rows, columns


def _stuff_regions(
    scene: Scene, classes: Tensor, rows: Tensor, columns: Tensor, generator: torch.Generator
) -> Tensor:
    """Cells around random seeds, classes from bottom to top by frequency."""
    num_regions = 3 * len(classes)
    seed_rows = torch.rand(num_regions, generator=generator)
    seed_columns = torch.rand(num_regions, generator=generator)
    # Each class takes a band of the image, the most frequent one (road) at the bottom.
    band = ((1 - seed_rows) * len(classes)).long().clamp(max=len(classes) - 1)
    # Cells are wider than high; a weight makes some large and some small.
    weight = 0.02 * torch.rand(num_regions, generator=generator)
    nearest = torch.full(rows.shape, torch.inf)
    labels = torch.empty(rows.shape, dtype=torch.int64)
    for region in range(num_regions):
        distance = (rows / scene.height - seed_rows[region]).square_()
        distance += (columns / scene.width - seed_columns[region]).square_().div_(4)
        distance -= weight[region]
        closer = distance < nearest
        nearest = torch.minimum(nearest, distance)
        labels[closer] = classes[band[region]]
    return labels


def _object_mask(scene: Scene, rows: Tensor, columns: Tensor, generator: torch.Generator) -> Tensor:
    """(H, W) bool: an ellipse with irregular border at a random place."""
    centre = torch.rand(2, generator=generator)
    spread, elongation = torch.randn(2, generator=generator)
    area = scene.object_area * torch.exp(scene.area_spread * spread)
    radius = (area / torch.pi).sqrt()
    aspect = torch.exp(0.5 * elongation)
    across = (columns - centre[1] * scene.width) / (radius / aspect)
    along = (rows - centre[0] * scene.height) / (radius * aspect)
    return across.square_().add_(along.square_()) < 1
