"""Where the built-in datasets lie on disk, as their owners publish them.

Each function lists one split; folders are relative to ``$DETECTRON2_DATASETS``, read when called.
Label files that the owner does not publish as they are needed come from
``tools/prepare_dataset.py``. Sizes are read off the images of small datasets only: opening the
118,287 images of COCO before the first step would take minutes on a network disk.
"""

from __future__ import annotations

import os
import re

from detectron2.data import DatasetCatalog
from detectron2.utils.file_io import PathManager

from .files import (
    Folders,
    Record,
    add_sizes,
    datasets_root,
    load_folders,
    pair_files,
    read_names,
    root_hint,
)

_IMAGE, _JPG, _PNG = "_leftImg8bit.png", (".jpg",), (".png",)

# Videos of each split: Grammatikopoulou et al., "CaDIS: Cataract Dataset for Surgical RGB-Image
# Segmentation", Medical Image Analysis 2021.
CADIS_VIDEOS = {
    "train": (1, 3, 4, 6, 8, 9, 10, 11, 13, 14, 15, 17, 18, 19, 20, 21, 23, 24, 25),
    "val": (5, 7, 16),
    "test": (2, 12, 22),
}

# First and last frame of each sequence in a split, those of the 480x360 release of SegNet
# (Badrinarayanan et al., PAMI 2017). The validation frames of 0016E5 lie in a gap of its others.
CAMVID_FRAMES = {
    "train": (
        ("0001TP", 6690, 8520),
        ("0006R0", 930, 3930),
        ("0016E5", 390, 7920),
        ("0016E5", 8190, 8640),
    ),
    "val": (("0016E5", 7959, 8159),),
    "test": (("0001TP", 8550, 10380), ("Seq05VD", 0, 5100)),
}
_CAMVID_NAME = re.compile(r"(?P<sequence>[0-9A-Za-z]+)_f?(?P<frame>[0-9]+)")


def prepare_hint(dataset: str) -> str:
    """What to do where prepared label files are missing."""
    return f"run python tools/prepare_dataset.py {dataset}"


def voc2010_folder() -> str:
    """The folder of VOC2010 under the root: as its archive unpacks, or beside detectron2's VOCs."""
    root = datasets_root()
    unpacked = os.path.join("VOCdevkit", "VOC2010")
    return unpacked if PathManager.isdir(os.path.join(root, unpacked)) else "VOC2010"


def cityscapes_trainval() -> list[Record]:
    """Lists the training and validation images of Cityscapes, as detectron2 does each of them."""
    parts = ("cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val")
    return [record for part in parts for record in DatasetCatalog.get(part)]


def cityscapes_images(split: str) -> list[Record]:
    """Lists the images of a split of Cityscapes, ``cityscapes/leftImg8bit/SPLIT/CITY/``, without
    labels."""
    root, folder = datasets_root(), f"cityscapes/leftImg8bit/{split}"
    path = os.path.join(root, folder)
    if not PathManager.isdir(path):
        raise ValueError(f"The dataset folder {path} does not exist. {root_hint(root)}")
    cities = [c for c in sorted(PathManager.ls(path)) if PathManager.isdir(os.path.join(path, c))]
    if not cities:
        raise ValueError(f"The dataset folder {path} holds no folders of cities")
    parts = [Folders(f"{folder}/{city}", None, image_suffixes=(_IMAGE,)) for city in cities]
    return pair_files(root, parts)


def pascal_context(split: str) -> list[Record]:
    """Lists PASCAL-Context in VOC2010: the prepared labels and lists of what has them."""
    root, voc, hint = datasets_root(), voc2010_folder(), prepare_hint("pascal_context")
    names_file = os.path.join(root, voc, f"ImageSets/SegmentationContext/{split}.txt")
    if not PathManager.isfile(names_file):
        raise ValueError(f"The split file {names_file} does not exist: {hint}. {root_hint(root)}")
    folders = Folders(
        f"{voc}/JPEGImages",
        f"{voc}/SegmentationClassContext",
        image_suffixes=_JPG,
        names=read_names(names_file),
        missing_labels=hint,
    )
    return pair_files(root, [folders])


def coco_stuff_10k(split: str) -> list[Record]:
    """Lists COCO-Stuff 10k: ``coco_stuff_10k/{images,labels}/`` by ``imageLists/SPLIT.txt``."""
    root = datasets_root()
    folders = Folders(
        "coco_stuff_10k/images",
        "coco_stuff_10k/labels",
        image_suffixes=_JPG,
        names=read_names(os.path.join(root, f"coco_stuff_10k/imageLists/{split}.txt")),
        missing_labels=prepare_hint("coco_stuff_10k"),
    )
    return pair_files(root, [folders])


def coco_stuff_164k(split: str) -> list[Record]:
    """Lists COCO-Stuff 164k: ``coco/SPLIT/`` and ``coco/stuffthingmaps/SPLIT/``."""
    folders = Folders(f"coco/{split}", f"coco/stuffthingmaps/{split}", image_suffixes=_JPG)
    return pair_files(datasets_root(), [folders])


def camvid(*splits: str) -> list[Record]:
    """Lists CamVid in 11 classes: ``camvid/SPLIT`` and ``camvid/SPLITannot``, or
    ``camvid/images/SPLIT`` and ``camvid/annotations/SPLIT``."""
    root = datasets_root()
    published = [PathManager.isdir(os.path.join(root, f"camvid/{split}annot")) for split in splits]
    return load_folders(
        *(
            (f"camvid/{split}", f"camvid/{split}annot")
            if as_published
            else (f"camvid/images/{split}", f"camvid/annotations/{split}")
            for split, as_published in zip(splits, published, strict=True)
        )
    )


def camvid_original(split: str) -> list[Record]:
    """Lists CamVid as first released: ``camvid_original/{701_StillsRaw_full,labels}/``."""
    root, folder = datasets_root(), "camvid_original/701_StillsRaw_full"
    folders = Folders(
        folder,
        "camvid_original/labels",
        image_suffixes=_PNG,
        missing_labels=prepare_hint("camvid_original"),
    )
    every = pair_files(root, [folders])
    records = [record for record in every if camvid_split(record["image_id"]) == split]
    if not records:
        raise ValueError(f"The dataset folder {os.path.join(root, folder)} has no {split} frames")
    return add_sizes(records)


def camvid_split(name: str) -> str:
    """The split that a frame such as ``0016E5_07959`` or ``Seq05VD_f00000`` belongs to.

    Raises:
        ValueError: if it is none of CamVid's.
    """
    match = _CAMVID_NAME.fullmatch(name)
    if match:
        sequence, frame = match["sequence"], int(match["frame"])
        for split, parts in CAMVID_FRAMES.items():
            if any(sequence == s and first <= frame <= last for s, first, last in parts):
                return split
    raise ValueError(
        f"{name} is no labelled frame of CamVid: remove it; CamVid's are called like "
        "0016E5_07959 or Seq05VD_f00000"
    )


def cadis(split: str) -> list[Record]:
    """Lists CaDIS: ``cadis/VideoNN/{Images,Labels}/``."""
    parts = [
        Folders(f"cadis/Video{v:02d}/Images", f"cadis/Video{v:02d}/Labels", image_suffixes=_PNG)
        for v in CADIS_VIDEOS[split]
    ]
    return add_sizes(pair_files(datasets_root(), parts))
