"""How the download of each built-in dataset becomes label files that can be loaded."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .classes import read_json
from .datasets import ADE20K, CATALOG, CITYSCAPES, COCO_STUFF
from .files import datasets_root, read_names, root_hint
from .labels import LabelMap, load_labels
from .prepare import Job, Plan
from .reading import READ_ERRORS, open_image
from .sources import camvid_split, voc2010_folder

# The labels that PASCAL-Context keeps, of the 459 of its label files, in the order of the 60
# classes: Mottaghi et al., CVPR 2014. All others are background.
PASCAL_CONTEXT_IDS = (
    *(0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85),
    *(98, 104, 105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284),
    *(295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427),
    *(440, 445, 454, 458),
)
_PASCAL_CONTEXT_LABELS = 459


def _names(folder: str, suffix: str) -> list[str]:
    """Names, without a suffix, of the files of a folder that have it; none if it is not there."""
    found = os.listdir(folder) if os.path.isdir(folder) else []
    # archives of macOS hold ._NAME files
    return sorted(n.removesuffix(suffix) for n in found if n.endswith(suffix) and n[0] != ".")


def _subfolders(folder: str) -> list[str]:
    found = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [path for path in (os.path.join(folder, n) for n in found) if os.path.isdir(path)]


def _check_found(found: Collection[Any], files: str, archive: str) -> None:
    """Raises ValueError, which says what to unpack, if no files were found."""
    if not found:
        raise ValueError(
            f"There is no {os.path.join(datasets_root(), files)}: unpack {archive} there. "
            f"{root_hint(datasets_root())}"
        )


def _cityscapes() -> Plan:
    """`*_labelIds.png` to `*_labelTrainIds.png`, beside them."""
    label_map = LabelMap(CITYSCAPES.id_to_class, CITYSCAPES.void_ids, dataset_name="Cityscapes")
    source, target, jobs = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png", []
    for split in ("train", "val"):
        for city in _subfolders(os.path.join(datasets_root(), "cityscapes/gtFine", split)):
            for name in _names(city, source):
                make = partial(load_labels, os.path.join(city, name + source), label_map)
                path = os.path.join(city, name + target)
                jobs.append(Job(f"cityscapes_fine_sem_seg_{split}", path, make))
    _check_found(jobs, f"cityscapes/gtFine/SPLIT/CITY/*{source}", "gtFine_trainvaltest.zip")
    return Plan(jobs, _counts("cityscapes_fine", train=2975, val=500))


def _ade20k() -> Plan:
    """0 for void and 1..150 to 255 and 0..149, in `annotations_detectron2`."""
    label_map = LabelMap(ADE20K.id_to_class, ADE20K.void_ids, dataset_name="ADE20K")
    root, jobs = os.path.join(datasets_root(), "ADEChallengeData2016"), []
    for split, part in (("train", "training"), ("val", "validation")):
        folder = os.path.join(root, "annotations", part)
        for name in _names(folder, ".png"):
            make = partial(load_labels, os.path.join(folder, name + ".png"), label_map)
            target = os.path.join(root, "annotations_detectron2", part, name + ".png")
            jobs.append(Job(f"ade20k_sem_seg_{split}", target, make))
    files = "ADEChallengeData2016/annotations/training/*.png"
    _check_found(jobs, files, "ADEChallengeData2016.zip")
    return Plan(jobs, _counts("ade20k", train=20210, val=2000))


def _pascal_context() -> Plan:
    """459 labels to 60 classes, from the .mat files or else from the JSON file of masks."""
    root = os.path.join(datasets_root(), voc2010_folder())
    make_all = (
        _pascal_context_mat
        if os.path.isdir(os.path.join(root, "trainval"))
        else _pascal_context_json
    )
    made = make_all(root)
    jobs, lists, counts = [], {}, {}
    for split, makers in made.items():
        dataset = f"pascal_context_60_sem_seg_{split}"
        target = os.path.join(root, "SegmentationClassContext")
        jobs += [Job(dataset, os.path.join(target, f"{n}.png"), make) for n, make in makers.items()]
        lists[os.path.join(root, f"ImageSets/SegmentationContext/{split}.txt")] = list(makers)
        counts[dataset] = (len(makers),)
    if make_all is _pascal_context_mat:
        counts = _counts("pascal_context_60", train=4998, val=5105)
    return Plan(jobs, counts, lists)


Makers = dict[str, Callable[[], np.ndarray]]


def _pascal_context_mat(root: str) -> dict[str, Makers]:
    """What makes each image's labels, by split, from `trainval/NAME.mat` of the 459 labels."""
    folder = os.path.join(root, "trainval")
    present = set(_names(folder, ".mat"))
    _check_found(present, f"{voc2010_folder()}/trainval/*.mat", "the labels of PASCAL-Context")
    label_map = _pascal_context_map()

    def make(name: str) -> np.ndarray:
        path = os.path.join(folder, f"{name}.mat")
        return label_map.apply(_mat_labels(path, "LabelMap"), path)

    splits = {}
    for split in ("train", "val"):
        names = read_names(os.path.join(root, f"ImageSets/Main/{split}.txt"))
        splits[split] = {name: partial(make, name) for name in names if name in present}
    return splits


def _pascal_context_json(root: str) -> dict[str, Makers]:
    """What makes each image's labels, by split, from the masks of `trainval_merged.json`.

    Images of the file without any mask are not labelled and are left out.
    """
    path = os.path.join(root, "trainval_merged.json")
    if not os.path.isfile(path):
        raise ValueError(
            f"{root} holds neither trainval/*.mat nor trainval_merged.json: put the annotations of "
            f"PASCAL-Context there. {root_hint(datasets_root())}"
        )
    data = read_json(path)
    try:
        masks = defaultdict(list)
        for row in data["annos_segmentation"]:
            masks[row["image_id"]].append((row["category_id"], row["segmentation"]))
        images = {row["image_id"]: row for row in data["images"]}
        splits: dict[str, Makers] = {"train": {}, "val": {}}
        label_map = _pascal_context_map()
        for image_id in sorted(masks):
            image = images[image_id]
            name, size = os.path.splitext(image["file_name"])[0], (image["height"], image["width"])
            splits[image["phase"]][name] = partial(
                _draw_masks, masks[image_id], size, label_map, f"{path}, image {name}"
            )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the file of PASCAL-Context's masks: {error!r} is missing or of another "
            "type. Take the .mat files instead"
        ) from error
    return splits


def _draw_masks(
    masks: list[tuple[int, Any]], size: tuple[int, int], label_map: LabelMap, source: str
) -> np.ndarray:
    """Draws the masks of an image, (category, COCO mask), as (H, W) uint8 classes."""
    labels = np.zeros(size, dtype=np.uint16)
    for category, mask in masks:
        try:
            # Run lengths as numbers or polygons are turned to compressed run lengths first.
            if isinstance(mask, list):
                mask = mask_util.merge(mask_util.frPyObjects(mask, *size))
            elif isinstance(mask["counts"], list):
                mask = mask_util.frPyObjects(mask, *size)
            labels[mask_util.decode(mask).astype(bool)] = category
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{source}: cannot read a mask: {error}") from error
    return label_map.apply(labels, source)


def _pascal_context_map() -> LabelMap:
    others = dict.fromkeys(range(_PASCAL_CONTEXT_LABELS + 1), 0)
    kept = {label: k for k, label in enumerate(PASCAL_CONTEXT_IDS)}
    return LabelMap({**others, **kept}, dataset_name="PASCAL-Context")


def _coco_stuff_10k() -> Plan:
    """`annotations/NAME.mat` to `labels/NAME.png`, category ids as they are."""
    root, jobs = os.path.join(datasets_root(), "coco_stuff_10k"), []
    folder = os.path.join(root, "annotations")
    present = set(_names(folder, ".mat"))
    _check_found(present, "coco_stuff_10k/annotations/*.mat", "cocostuff-10k-v1.1.zip")
    label_map = LabelMap(COCO_STUFF.id_to_class, COCO_STUFF.void_ids, dataset_name="COCO-Stuff")

    def make(name: str) -> np.ndarray:
        path = os.path.join(folder, f"{name}.mat")
        labels = _mat_labels(path, "S")
        label_map.apply(labels, path)  # raises where a value is no category
        return labels.astype(np.uint8)

    for split in ("train", "test"):
        for name in read_names(os.path.join(root, f"imageLists/{split}.txt")):
            target = os.path.join(root, "labels", f"{name}.png")
            if name in present:
                jobs.append(Job(f"coco_stuff_10k_sem_seg_{split}", target, partial(make, name)))
    return Plan(jobs, _counts("coco_stuff_10k", train=9000, test=1000))


def _camvid_original() -> Plan:
    """Colours of `LabeledApproved_full/NAME_L.png` to positions in the list of 32 labels."""
    root, jobs = os.path.join(datasets_root(), "camvid_original"), []
    folder = os.path.join(root, "LabeledApproved_full")
    labels = read_json(str(CATALOG / "camvid_labels.json"))["labels"]
    positions = {tuple(label["color"]): k for k, label in enumerate(labels)}
    for name in _names(folder, "_L.png"):
        make = partial(_color_labels, os.path.join(folder, f"{name}_L.png"), positions)
        target = os.path.join(root, "labels", f"{name}.png")
        jobs.append(Job(f"camvid_original_sem_seg_{camvid_split(name)}", target, make))
    files = "camvid_original/LabeledApproved_full/*_L.png"
    _check_found(jobs, files, "LabeledApproved_full.zip")
    return Plan(jobs, _counts("camvid_original", train=367, val=101, test=233))


def _color_labels(path: str, positions: dict[tuple[int, int, int], int]) -> np.ndarray:
    """Reads an image whose colours are labels as (H, W) uint8 positions."""
    try:
        with open_image(path) as image:
            colors = np.asarray(image.convert("RGB")).astype(np.uint32)
    except READ_ERRORS as error:
        raise ValueError(f"Cannot read the label image {path}: {error}") from error
    codes = colors @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    known = {(r << 16) + (g << 8) + b: k for (r, g, b), k in positions.items()}
    values, inverse = np.unique(codes, return_inverse=True)
    unknown = [f"#{v:06x}" for v in values.tolist() if v not in known]
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} colours that are no labels, as {', '.join(unknown[:3])}: "
            "take the label images as published, without resizing or compressing them"
        )
    table = np.array([known[v] for v in values.tolist()], dtype=np.uint8)
    return table[inverse].reshape(codes.shape)


def _mat_labels(path: str, key: str) -> np.ndarray:
    """Reads the (H, W) integer labels of a MATLAB file."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ValueError(
            "MATLAB files need scipy: pip install scipy, or install with the extra [datasets]"
        ) from error
    try:
        labels = np.asarray(loadmat(path, variable_names=[key])[key])
    except (
        *(OSError, KeyError, TypeError, ValueError, NotImplementedError),
        *(MatReadError, zlib.error),
    ) as error:
        raise ValueError(f"Cannot read {key!r} of {path}: {error}") from error
    if labels.dtype.kind == "f" and np.array_equal(labels, labels.astype(np.int64)):
        labels = labels.astype(np.int64)
    return labels


def _counts(dataset: str, **splits: int | tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        f"{dataset}_sem_seg_{split}": (count,) if isinstance(count, int) else count
        for split, count in splits.items()
    }


def _as_published(counts: dict[str, tuple[int, ...]]) -> Plan:
    return Plan([], counts)


# Lists of CaDIS' frames have 586 for test; the paper's total of 4,671 frames leaves 587.
_CADIS_COUNTS = _counts("cadis_task1", train=3550, val=534, test=(586, 587))

PREPARATIONS: dict[str, Callable[[], Plan]] = {
    "ade20k": _ade20k,
    "cadis": partial(_as_published, _CADIS_COUNTS),
    "camvid": partial(_as_published, _counts("camvid", train=367, val=101, test=233)),
    "camvid_original": _camvid_original,
    "cityscapes": _cityscapes,
    "coco_stuff_10k": _coco_stuff_10k,
    "coco_stuff_164k": partial(_as_published, _counts("coco_stuff_164k", train=118287, val=5000)),
    "pascal_context": _pascal_context,
}
"""What to do for each dataset; those that are used as published are only counted."""
