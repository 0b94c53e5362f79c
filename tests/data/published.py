"""Writes small datasets in the formats in which their owners publish them.

Each label file shows every value of its format once, in order, so that a test can read off what
each value becomes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from PIL import Image
from scipy.io import savemat


def one_row(values: Iterable[int], dtype: type = np.uint8) -> np.ndarray:
    """Label values side by side, (2, number of values)."""
    return np.tile(np.array(list(values), dtype=dtype), (2, 1))


def write_image(path: Path, labels: np.ndarray) -> None:
    """An image of the size of its labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", labels.shape[::-1], (10, 20, 30)).save(path)


def write_png(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def set_root(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Makes a folder the root of all datasets, also of those that detectron2 has registered with
    the one that was set when it was imported."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    catalog: dict = {}
    with monkeypatch.context() as patch:
        patch.setattr(DatasetCatalog, "data", catalog)
        patch.setattr(MetadataCatalog, "data", {})
        builtin.register_all_cityscapes(str(root))
        builtin.register_all_ade20k(str(root))
    for name, load in catalog.items():
        if "_sem_seg_" in name:
            monkeypatch.setitem(DatasetCatalog.data, name, load)


def cityscapes(root: Path) -> None:
    """Two cities in training, one in validation and one in test; label ids 0..33 and 255."""
    labels = one_row([*range(34), 255])
    for split, city, frame in (
        ("train", "ulm", 1),
        ("train", "aachen", 2),
        ("train", "aachen", 1),
        ("val", "munster", 0),
        ("test", "berlin", 0),
    ):
        name = f"{city}_{frame:06d}_000019"
        image = root / f"cityscapes/leftImg8bit/{split}/{city}/{name}_leftImg8bit.png"
        write_image(image, labels)
        folder = root / f"cityscapes/gtFine/{split}/{city}"
        write_png(folder / f"{name}_gtFine_labelIds.png", labels)
        write_png(folder / f"{name}_gtFine_instanceIds.png", labels)
        polygons = {"imgHeight": labels.shape[0], "imgWidth": labels.shape[1], "objects": []}
        (folder / f"{name}_gtFine_polygons.json").write_text(json.dumps(polygons))


def ade20k(root: Path, count: int = 2) -> None:
    """Values 0..150."""
    folder, labels = root / "ADEChallengeData2016", one_row(range(151))
    for part, split in (("training", "train"), ("validation", "val")):
        for i in range(1, count + 1):
            write_image(folder / f"images/{part}/ADE_{split}_{i:08d}.jpg", labels)
            write_png(folder / f"annotations/{part}/ADE_{split}_{i:08d}.png", labels)


PASCAL_SPLITS = {"train": ["2008_000002", "2008_000007"], "val": ["2008_000003"]}


def voc2010(root: Path, labels: np.ndarray, folder: str = "VOCdevkit/VOC2010") -> Path:
    """VOC2010's own files, with one image more than PASCAL-Context labels."""
    voc = root / folder
    for split, names in PASCAL_SPLITS.items():
        path = voc / f"ImageSets/Main/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))
        for name in names:
            write_image(voc / f"JPEGImages/{name}.jpg", labels)
    write_image(voc / "JPEGImages/2010_009999.jpg", labels)
    return voc


def pascal_context_mat(root: Path, folder: str = "VOCdevkit/VOC2010") -> None:
    """The 459 labels in MATLAB's format."""
    labels = one_row(range(460), np.uint16)
    voc = voc2010(root, labels, folder)
    (voc / "trainval").mkdir()
    for names in PASCAL_SPLITS.values():
        for name in names:
            savemat(voc / f"trainval/{name}.mat", {"LabelMap": labels}, do_compression=True)


def pascal_context_json(root: Path, masks: dict[int, list[int]]) -> Path:
    """Masks of a 2x8 image as run lengths; `masks` maps a category to its columns."""
    voc = voc2010(root, one_row([0] * 8))
    images, rows = [], []
    for phase, names in PASCAL_SPLITS.items():
        for name in names:
            image_id = int(name.replace("_", ""))
            size = {"height": 2, "width": 8}
            images.append(
                {"file_name": f"{name}.jpg", "phase": phase, "image_id": image_id, **size}
            )
            for category, columns in masks.items():
                mask = np.zeros((2, 8), dtype=np.uint8, order="F")
                mask[:, columns] = 1
                runs = mask_util.encode(mask)
                runs["counts"] = runs["counts"].decode()
                rows.append({"image_id": image_id, "category_id": category, "segmentation": runs})
    images.append({**images[0], "file_name": "2010_009999.jpg", "image_id": 2010009999})
    path = voc / "trainval_merged.json"
    path.write_text(json.dumps({"images": images, "annos_segmentation": rows}))
    return path


# Category ids that COCO-Stuff does not use.
COCO_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_IDS = [i for i in range(1, 183) if i not in COCO_UNUSED]


def coco_stuff_10k(root: Path) -> None:
    """Values 0 and the category ids, in MATLAB's format."""
    folder, labels = root / "coco_stuff_10k", one_row([0, *COCO_IDS])
    (folder / "annotations").mkdir(parents=True)
    (folder / "imageLists").mkdir()
    for split, ids in (("train", (77, 9)), ("test", (78,))):
        names = [f"COCO_train2014_{i:012d}" for i in ids]
        (folder / f"imageLists/{split}.txt").write_text("\n".join(names))
        for name in names:
            write_image(folder / f"images/{name}.jpg", labels)
            savemat(folder / f"annotations/{name}.mat", {"S": labels, "names": ["unlabeled"]})


def coco_stuff_164k(root: Path) -> None:
    """Values 255 and the category ids less one."""
    labels = one_row([255, *(i - 1 for i in COCO_IDS)])
    for split, count in (("train2017", 2), ("val2017", 1)):
        for i in range(count):
            write_image(root / f"coco/{split}/{i:012d}.jpg", labels)
            write_png(root / f"coco/stuffthingmaps/{split}/{i:012d}.png", labels)


def camvid_original(root: Path, colors: Sequence[Sequence[int]]) -> None:
    """One frame of each split, the colours side by side."""
    folder = root / "camvid_original"
    picture = np.tile(np.array(colors, dtype=np.uint8), (2, 1, 1))
    for name in ("0001TP_006690", "0016E5_07959", "Seq05VD_f00000"):
        write_image(folder / f"701_StillsRaw_full/{name}.png", picture[:, :, 0])
        write_png(folder / f"LabeledApproved_full/{name}_L.png", picture)


def camvid_segnet(root: Path) -> None:
    """The tutorial's folders; values 0..11."""
    for split in ("train", "val", "test"):
        labels = one_row(range(12))
        write_image(root / f"camvid/{split}/0016E5_{split}.png", labels)
        write_png(root / f"camvid/{split}annot/0016E5_{split}.png", labels)


def cadis(root: Path) -> None:
    """One frame of each of the 25 videos; labels 0..35."""
    labels = one_row(range(36))
    for video in range(1, 26):
        name = f"Video{video}_frame{90 * video:06d}.png"
        write_image(root / f"cadis/Video{video:02d}/Images/{name}", labels)
        write_png(root / f"cadis/Video{video:02d}/Labels/{name}", labels)
