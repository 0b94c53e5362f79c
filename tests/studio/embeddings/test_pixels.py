"""Which pixels are drawn, and what is read of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from contrast_d2.contrast.sampling import downsample_labels
from contrast_d2.studio.embeddings import PixelSet, collect_pixels
from contrast_d2.studio.embeddings.layers import LayerOutput
from contrast_d2.studio.embeddings.pixels import PixelReservoir, lowest_of_each_class

STRIDE, CLASSES = 4, 3


def tap(factor: float, stride: int = STRIDE):
    """Stands for a model whose embedding of a pixel tells where it is, and in which image."""

    def run(sample: dict) -> LayerOutput:
        height, width = (-(-n // 8) * 8 for n in sample["image"].shape[-2:])
        h, w = height // stride, width // stride
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        where = torch.stack([x, y, torch.full((h, w), sample["number"])]).float() * factor
        return LayerOutput(where, where.abs(), (height, width))

    return run


def samples(count: int = 6, size: tuple[int, int] = (30, 44)) -> list[dict]:
    """Images whose red tells the column and green the row; class 2 is rare, in two images only."""
    rng = torch.Generator().manual_seed(0)
    height, width = size
    found = []
    for number in range(count):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        labels = torch.randint(0, 2, size, generator=rng)
        labels[:8] = 255
        if number < 2:
            labels[12:16, 12:16] = 2
        found.append(
            {
                "image": torch.stack([columns, rows, torch.zeros_like(rows)]).byte(),
                "sem_seg": labels,
                "file_name": f"data/{number}.png",
                "number": number,
                "height": 2 * height,  # the mapper has halved it
                "width": 2 * width,
            }
        )
    return found


def collect(**options) -> PixelSet:
    settings = {
        "num_classes": CLASSES,
        "ignore_label": 255,
        "per_class": 20,
        "per_image": 5,
        "seed": 0,
        "patch_reach": 4,
        "patch_side": 9,
    }
    taps = options.pop("taps", {"a": tap(1), "b": tap(10)})
    images = options.pop("images", None) or samples()
    return collect_pixels(taps, images, **settings | options)


def test_every_pixel_is_what_it_says() -> None:
    pixels = collect()
    images = samples()
    for i in range(len(pixels.labels)):
        x, y, number = pixels.embeddings["a"][i].astype(int)
        assert number == pixels.image[i]
        labels = images[number]["sem_seg"]
        padded = torch.nn.functional.pad(labels, (0, 4, 0, 2), value=255)
        assert downsample_labels(padded[None], (8, 12))[0, y, x] == pixels.labels[i]
        # Position in a file twice as large.
        assert pixels.position[i].tolist() == [2 * STRIDE * x, 2 * STRIDE * y]
        cell = padded[STRIDE * y : STRIDE * (y + 1), STRIDE * x : STRIDE * (x + 1)]
        assert pixels.one_class[i] == (len(cell.unique()) == 1)
        # The patch's middle is the pixel.
        assert pixels.patches[i, 4, 4].tolist() == [STRIDE * x, STRIDE * y, 0]
        scores = pixels.embeddings["a"][i]
        assert pixels.predictions["a"][i] == np.argmax(scores)
    np.testing.assert_array_equal(pixels.embeddings["b"], 10 * pixels.embeddings["a"])
    assert pixels.one_class.any() and not pixels.one_class.all()
    assert pixels.file_names == tuple(f"data/{n}.png" for n in range(6))


def test_classes_and_images_give_alike() -> None:
    pixels = collect()
    # Class 2 fills one pixel of the map in each of two images.
    assert np.bincount(pixels.labels).tolist() == [20, 20, 2]
    pairs, counts = np.unique(np.stack([pixels.labels, pixels.image]), axis=1, return_counts=True)
    assert counts.max() <= 5
    assert len(np.unique(pixels.image[pixels.labels == 0])) >= 5
    every = np.stack([pixels.labels, pixels.image, *pixels.position.T])
    assert np.unique(every, axis=1).shape[1] == len(pixels.labels)


def test_the_draw_is_of_labels_and_seed_alone() -> None:
    first, again = collect(), collect(taps={"c": tap(-3)})
    np.testing.assert_array_equal(first.position, again.position)
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.position, collect(seed=1).position)


def test_channels_in_the_other_order() -> None:
    # Of the images' channels the first is then blue, the last red.
    pixels = collect(image_format="BGR")
    assert (pixels.patches[..., 0] == 0).all() and pixels.patches[..., 2].any()


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"differ in size, \{'a': \(8, 12\), 'b': \(4, 6\)\}"):
        collect(taps={"a": tap(1), "b": tap(1, stride=8)})
    empty = samples(2)
    for sample in empty:
        sample["sem_seg"][:] = 255
    with pytest.raises(ValueError, match="none of 2 images has a labelled pixel"):
        collect(images=empty)
    for name in ("per_class", "per_image"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            collect(**{name: 0})
    with pytest.raises(ValueError, match="seed=-1"):
        collect(seed=-1)


def test_the_lowest_of_each_class() -> None:
    labels = np.array([1, 0, 1, 1, 5])
    keys = np.array([0.3, 0.9, 0.1, 0.2, 0.4])
    assert lowest_of_each_class(labels, keys, 2).tolist() == [1, 2, 3, 4]


def test_a_reservoir_keeps_the_lowest_of_all_that_was_added() -> None:
    rng = np.random.default_rng(0)
    reservoir = PixelReservoir(7)
    parts = [
        {"label": rng.integers(0, 3, 1500), "key": rng.random(1500), "row": np.arange(1500) + start}
        for start in range(0, 9000, 1500)
    ]
    for part in parts:
        reservoir.add(part)
        assert len(reservoir._parts) <= 3  # memory is bounded
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    kept = lowest_of_each_class(every["label"], every["key"], 7)
    assert sorted(reservoir.rows()["row"]) == kept.tolist() and len(kept) == 21
