"""The built-in datasets: one table, registered in detectron2's catalogs by one loop.

A new dataset is one more row of ``DATASETS``. Files are looked up under the folder that the
environment variable ``DETECTRON2_DATASETS`` names, when the dataset is first loaded.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image

from . import shapes
from .labels import IGNORE_LABEL

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_LABEL_SUFFIX = ".png"

# EXIF tag 274, orientation: these values swap width and height. detectron2 turns such images
# upright when it reads them.
_EXIF_ORIENTATION, _EXIF_TRANSPOSED = 274, (5, 6, 7, 8)


class Classes(NamedTuple):
    """The classes of a dataset, in contiguous order, and how its label files encode them."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    """RGB, 0..255, of each class."""
    ids: tuple[int, ...]
    """The value of each class in the label files."""
    void_ids: tuple[int, ...]
    """Values in the label files that mean "not labelled"."""


class Dataset(NamedTuple):
    """One row of the table."""

    name: str
    load: Callable[[], list[dict[str, Any]]]
    """Returns the records, in detectron2's dataset format."""
    classes: Classes


def load_folders(*folders: tuple[str, str]) -> list[dict[str, Any]]:
    """Lists the images of one or more folders together with their label files.

    ``NAME.jpg`` (or .jpeg, .png) belongs to ``NAME.png`` of the label folder.

    Args:
        folders: pairs of an image and a label folder, relative to ``$DETECTRON2_DATASETS``
            (default: ``datasets``), which is read now.

    Returns:
        One record per image, sorted by name within each folder, with ``file_name``,
        ``sem_seg_file_name``, ``height`` and ``width`` (pixels) and ``image_id`` (the NAME).

    Raises:
        ValueError: if a folder is missing or holds no image, or an image cannot be read or has
            no label file.
    """
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    hint = f"Set DETECTRON2_DATASETS (now {root!r}) to the folder that holds the datasets"
    records = []
    for image_folder, label_folder in folders:
        image_dir, label_dir = os.path.join(root, image_folder), os.path.join(root, label_folder)
        for path in (image_dir, label_dir):
            if not PathManager.isdir(path):
                raise ValueError(f"The dataset folder {path} does not exist. {hint}")
        images = [n for n in sorted(PathManager.ls(image_dir)) if n.endswith(_IMAGE_SUFFIXES)]
        if not images:
            raise ValueError(f"The dataset folder {image_dir} holds no images. {hint}")
        labels = set(PathManager.ls(label_dir))
        for name in images:
            stem = os.path.splitext(name)[0]
            if stem + _LABEL_SUFFIX not in labels:
                raise ValueError(
                    f"The image {os.path.join(image_dir, name)} has no label file "
                    f"{os.path.join(label_dir, stem + _LABEL_SUFFIX)}: add it or remove the image "
                    f"(DETECTRON2_DATASETS is {root!r})"
                )
            file_name = os.path.join(image_dir, name)
            height, width = _image_size(file_name)
            records.append(
                {
                    "file_name": file_name,
                    "sem_seg_file_name": os.path.join(label_dir, stem + _LABEL_SUFFIX),
                    "image_id": stem,
                    "height": height,
                    "width": width,
                }
            )
    return records


def _image_size(path: str) -> tuple[int, int]:
    """Reads (height, width) from an image's header, as detectron2 will orient it."""
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            width, height = image.size
            orientation = image.getexif().get(_EXIF_ORIENTATION)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {path}: {error}") from error
    return (width, height) if orientation in _EXIF_TRANSPOSED else (height, width)


# Brostow et al., "Semantic Object Classes in Video", Pattern Recognition Letters 2009: the colours
# are the database's own. The reduction to 11 classes is that of Badrinarayanan et al., "SegNet",
# PAMI 2017.
CAMVID = Classes(
    names=(
        "Sky",
        "Building",
        "Pole",
        "Road",
        "Pavement",
        "Tree",
        "SignSymbol",
        "Fence",
        "Car",
        "Pedestrian",
        "Bicyclist",
    ),
    colors=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ids=tuple(range(11)),
    void_ids=(11,),
)

SHAPES = Classes(
    names=shapes.CLASS_NAMES,
    colors=shapes.CLASS_COLORS,
    ids=tuple(range(len(shapes.CLASS_NAMES))),
    void_ids=(shapes.VOID_ID,),
)


def _camvid(*splits: str) -> Callable[[], list[dict[str, Any]]]:
    folders = [(f"camvid/images/{split}", f"camvid/annotations/{split}") for split in splits]
    return partial(load_folders, *folders)


DATASETS = (
    Dataset("camvid_sem_seg_train", _camvid("train"), CAMVID),
    Dataset("camvid_sem_seg_val", _camvid("val"), CAMVID),
    Dataset("camvid_sem_seg_test", _camvid("test"), CAMVID),
    Dataset("camvid_sem_seg_trainval", _camvid("train", "val"), CAMVID),
    Dataset("shapes_sem_seg_train", partial(shapes.load_shapes, "train"), SHAPES),
    Dataset("shapes_sem_seg_val", partial(shapes.load_shapes, "val"), SHAPES),
)


def register_datasets(datasets: Iterable[Dataset] = DATASETS) -> None:
    """Registers datasets in detectron2's DatasetCatalog and MetadataCatalog.

    A name that is already registered is left as it is, whoever registered it. Nothing is read
    from disk.

    Args:
        datasets: rows to register.
    """
    for row in datasets:
        if row.name in DatasetCatalog:
            continue
        DatasetCatalog.register(row.name, row.load)
        MetadataCatalog.get(row.name).set(
            evaluator_type="sem_seg",
            ignore_label=IGNORE_LABEL,
            stuff_classes=list(row.classes.names),
            stuff_colors=[list(color) for color in row.classes.colors],
            stuff_dataset_id_to_contiguous_id={v: k for k, v in enumerate(row.classes.ids)},
            void_dataset_ids=row.classes.void_ids,
        )


def check_registered(name: str) -> None:
    """Raises ValueError, with the nearest names, if no dataset is registered under a name."""
    if name in DatasetCatalog:
        return
    nearest = difflib.get_close_matches(name, list(DatasetCatalog.keys()), n=3)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "see DatasetCatalog.list()"
    raise ValueError(f"Dataset {name!r} is not registered: {hint}")
