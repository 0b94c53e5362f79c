"""Measures the way of an image from its file to the network's input, against other mappers.

Large images are made from frames of CamVid, because those of Cityscapes may not be handed on: the
middle of a frame is enlarged to 2048x1024 and gets noise such that its PNG file is about as large
as one of Cityscapes (2.3 MB).
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image
from torchvision.transforms import functional as tvf

from contrast_d2.data import RandomPad, RandomScale, SemSegMapper, reading, train_augmentations

from .machine import Say, installed, note, ratios, spread
from .opencv import opencv_mapper

PEER = "detectron2"
OPENCV = "OpenCV, crop first"
OURS = "contrast_d2"
PILLOW_ALONE = "contrast_d2, Pillow alone"
CACHED = "contrast_d2, with a cache"

CAMVID = "camvid_sem_seg_train"
_LARGE = "benchmark_2048x1024"
_SIZE = (1024, 2048)
# Standard deviations of the noise in grey levels: common to the channels, and of each.
_NOISE = (0.6, 0.35)
_SCALE, _ASPECT, _MAX_CLASS_AREA = (0.5, 2.0), (0.9, 1.1), 0.75

Mapper = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Images:
    """Some images of a dataset, and how they are cropped.

    Attributes:
        dataset: its registered name.
        records: of the images.
        crop_size: (height, width) of a training sample.
        stored_ignore_label: the value of unlabelled pixels in the label files.
    """

    dataset: str
    records: Sequence[dict[str, Any]]
    crop_size: tuple[int, int]
    stored_ignore_label: int


class TorchvisionJitter(T.Augmentation):
    """The changes of colour that both mappers apply, as torchvision's functions do them."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draws as `contrast_d2.data.ColorJitter` does."""
        adjust = [
            tvf.adjust_brightness,
            tvf.adjust_contrast,
            tvf.adjust_saturation,
            tvf.adjust_hue,
        ]
        amounts = [*(np.random.uniform(2 / 3, 1.5) for _ in range(3))]
        amounts.append(np.random.uniform(-0.05, 0.05))
        order = np.random.permutation(len(adjust))

        def apply(pil_image: Image.Image) -> Image.Image:
            for i in order:
                pil_image = adjust[i](pil_image, amounts[i])
            return pil_image

        return T.PILColorTransform(apply)


def mappers(images: Images, cache_dir: Path) -> dict[str, Mapper]:
    """What is compared. All draw from the same distribution.

    But for OpenCV's, where it is installed, all draw the same random numbers and give the same
    labels.

    Args:
        images: that are mapped.
        cache_dir: where one of the mappers keeps what it has decoded.
    """
    ignore_label = images.stored_ignore_label
    peer = DatasetMapper(
        is_train=True,
        image_format="RGB",
        augmentations=[
            RandomScale(_SCALE, _ASPECT),
            RandomPad(images.crop_size, ignore_label=ignore_label),
            T.RandomCrop_CategoryAreaConstraint(
                "absolute",
                images.crop_size,
                single_category_max_area=_MAX_CLASS_AREA,
                ignored_category=ignore_label,
            ),
            T.RandomFlip(0.5),
            TorchvisionJitter(),
        ],
    )
    ours, cached = (
        SemSegMapper(
            dataset_name=images.dataset,
            is_train=True,
            augmentations=train_augmentations(
                images.crop_size, scale=_SCALE, aspect=_ASPECT, max_class_area=_MAX_CLASS_AREA
            ),
            cache_dir=folder,
        )
        for folder in (None, str(cache_dir))
    )
    found: dict[str, Mapper] = {PEER: peer, OURS: ours, CACHED: cached}
    if reading.kornia_io is not None:

        def by_pillow(record: dict[str, Any]) -> dict[str, Any]:
            with mock.patch.object(reading, "kornia_io", None):
                return ours(record)

        found[PILLOW_ALONE] = by_pillow
    opencv = opencv_mapper(
        images.crop_size,
        scale=_SCALE,
        aspect=_ASPECT,
        max_class_area=_MAX_CLASS_AREA,
        ignore_label=ignore_label,
    )
    if opencv is not None:
        found[OPENCV] = opencv
    return found


def measure(
    device: torch.device, *, images: int, rounds: int, most_seconds: float, say: Say
) -> dict[str, Any]:
    """Measures the processor time of a training sample.

    Args:
        device: named in the results; all work is done by one thread of the processor.
        images: how many of each kind.
        rounds: how often each of them is mapped, at most, by every contender.
        most_seconds: no further round of a kind begins after so long, once there are five.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, and by kind of images and contender the processor time of
        a sample (ms), samples per second of one core, how many times detectron2's that is, and
        how many times its time ours takes.
    """
    torch.set_num_threads(1)
    packages = ("pillow", "torchvision", "kornia-rs", "opencv-python-headless")
    versions = {name: importlib.metadata.version(name) for name in packages if installed(name)}
    found = note(device)
    found["versions"].update(versions)
    found["kinds"] = {}
    with tempfile.TemporaryDirectory() as folder, _kinds(Path(folder), images) as kinds:
        for name, kind in kinds.items():
            say(f"\n{name}: {len(kind.records)} images, crops of {kind.crop_size}")
            contenders = mappers(kind, Path(folder) / "cache")
            seconds = _interleave(contenders, kind.records, rounds, most_seconds)
            found["kinds"][name] = _describe(kind) | {"rounds": len(seconds[PEER])}
            rows = found["kinds"][name]["contenders"] = {}
            for contender, times in seconds.items():
                row = rows[contender] = {
                    "ms": spread([1000 * t for t in times]),
                    "images_per_second": spread([1 / t for t in times]),
                    "times_detectron2": ratios(seconds[PEER], times),
                    "times_ours": ratios(times, seconds[OURS]),
                }
                ratio = row["times_detectron2"]
                say(
                    f"  {contender:28} {row['ms']['median']:7.1f} ms  "
                    f"{row['images_per_second']['median']:7.1f} images/s  "
                    f"{ratio['median']:.2f} x detectron2 ({ratio['p10']:.2f}-{ratio['p90']:.2f})  "
                    f"{row['times_ours']['median']:.2f} x our time"
                )
    return found


@contextmanager
def _kinds(folder: Path, count: int) -> Iterator[dict[str, Images]]:
    """The images, of which the large ones are registered as datasets for a while."""
    records = DatasetCatalog.get(CAMVID)
    records = records[:: max(1, len(records) // count)][:count]
    void = 11
    large = write_large_images(records, folder, void)
    metadata = MetadataCatalog.get(CAMVID)
    DatasetCatalog.register(_LARGE, lambda: large["png"])
    MetadataCatalog.get(_LARGE).set(stuff_classes=metadata.stuff_classes, ignore_label=255)
    try:
        yield {
            "2048x1024, PNG": Images(_LARGE, large["png"], (512, 1024), 255),
            "2048x1024, JPEG": Images(_LARGE, large["jpg"], (512, 1024), 255),
            "CamVid, 480x360, JPEG": Images(CAMVID, records, (360, 480), void),
        }
    finally:
        DatasetCatalog.remove(_LARGE)
        MetadataCatalog.remove(_LARGE)


def write_large_images(
    records: Sequence[Mapping[str, Any]], folder: Path, void: int
) -> dict[str, list[dict[str, Any]]]:
    """Writes enlarged images and labels.

    Args:
        records: of the images they are made from.
        folder: where they are written.
        void: what is to become 255 in the labels.

    Returns:
        Records by kind of image file, "png" and "jpg"; the labels are the same.
    """
    rng = np.random.default_rng(0)
    written: dict[str, list[dict[str, Any]]] = {"png": [], "jpg": []}
    for number, record in enumerate(records):
        with (
            Image.open(record["file_name"]) as frame,
            Image.open(record["sem_seg_file_name"]) as labels,
        ):
            width, height = frame.size
            margin = (height - width // 2) // 2
            box = (0, margin, width, height - margin)
            pixels = np.asarray(
                frame.convert("RGB").resize(_SIZE[::-1], Image.BICUBIC, box), np.float32
            )
            ids = np.asarray(labels.resize(_SIZE[::-1], Image.NEAREST, box))
        common, own = (
            rng.normal(0, deviation, (*_SIZE, channels))
            for deviation, channels in zip(_NOISE, (1, 3), strict=True)
        )
        noisy = Image.fromarray((pixels + common + own).round().clip(0, 255).astype(np.uint8))
        label_file = folder / f"{number}_labels.png"
        Image.fromarray(np.where(ids == void, 255, ids).astype(np.uint8)).save(label_file)
        for kind, options in (("png", {}), ("jpg", {"quality": 92})):
            image_file = folder / f"{number}.{kind}"
            noisy.save(image_file, **options)
            files = {"file_name": str(image_file), "sem_seg_file_name": str(label_file)}
            written[kind].append({**files, "height": _SIZE[0], "width": _SIZE[1]})
    return written


def _interleave(
    contenders: Mapping[str, Mapper],
    records: Sequence[dict[str, Any]],
    rounds: int,
    most_seconds: float,
) -> dict[str, list[float]]:
    """Processor seconds of a sample by contender and round, taken in turn on the same draws.

    Of processor time, because other work on the machine does not count in it, nor does a disk.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    # The first round warms up and is not counted.
    for number in range(rounds + 1):
        if number > 5 and time.perf_counter() - start > most_seconds:
            break
        for name, mapper in contenders.items():
            begin = time.process_time()
            for place, record in enumerate(records):
                np.random.seed(number * len(records) + place)
                mapper(record)
            if number:
                seconds[name].append((time.process_time() - begin) / len(records))
    return seconds


def _describe(images: Images) -> dict[str, Any]:
    def mean_bytes(key: str) -> float:
        return float(np.mean([Path(record[key]).stat().st_size for record in images.records]))

    return {
        "images": len(images.records),
        "crop_size": list(images.crop_size),
        "image_mb": mean_bytes("file_name") / 1e6,
        "label_kb": mean_bytes("sem_seg_file_name") / 1e3,
    }
