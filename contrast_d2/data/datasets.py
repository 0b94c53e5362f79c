"""The datasets: one table, registered in detectron2's catalogs by one loop.

A new built-in dataset is one more row of ``DATASETS``: its classes are a file in ``catalog/``, its
files are listed by a function in ``sources``. A folder with a ``dataset.json`` needs no row.
detectron2's own entries stay as they are: their rows add metadata.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf

from . import shapes, sources
from .classes import Classes, distinct_colors, parse_classes, read_json
from .files import Record, datasets_root
from .folder import FILE_NAME, load_folder_split, read_folder
from .labels import IGNORE_LABEL

CATALOG = Path(__file__).parent / "catalog"

_SEPARATOR = "_sem_seg_"

# Datasets of detectron2's whose label files `tools/prepare_dataset.py` writes, by its names.
_PREPARED = {"cityscapes_fine_sem_seg": "cityscapes", "ade20k_sem_seg": "ade20k"}


class Dataset(NamedTuple):
    """One row of the table."""

    name: str
    load: Callable[[], list[Record]] | None
    """Returns the records, in detectron2's dataset format; None where detectron2 has them."""
    classes: Classes
    contiguous_labels: bool = False
    """Whether the label files hold contiguous ids and IGNORE_LABEL for void, as detectron2's own
    entries expect. ``classes.ids`` are then only what predictions are written with."""


def load_classes(name: str) -> Classes:
    """Reads the classes of a built-in dataset from its file in ``catalog/``."""
    path = CATALOG / f"{name}.json"
    return parse_classes(read_json(str(path)), str(path))


def camvid_original_classes() -> Classes:
    """CamVid's 11 classes, in label files that hold positions in its list of 32 labels."""
    labels = read_json(str(CATALOG / "camvid_labels.json"))["labels"]
    by_class: dict[str | None, list[int]] = {}
    for position, label in enumerate(labels):
        by_class.setdefault(label["class"], []).append(position)
    return CAMVID._replace(
        ids=tuple(tuple(by_class[name]) for name in CAMVID.names), void_ids=tuple(by_class[None])
    )


def _ade20k_classes() -> Classes:
    names = tuple(MetadataCatalog.get("ade20k_sem_seg_train").stuff_classes)
    ids = tuple((k + 1,) for k in range(len(names)))
    return Classes(names, distinct_colors(len(names)), ids, void_ids=(0,))


def _without_background(classes: Classes) -> Classes:
    """The same label files with their first class as void."""
    return Classes(classes.names[1:], classes.colors[1:], classes.ids[1:], void_ids=classes.ids[0])


def _less_one(classes: Classes) -> Classes:
    """The same classes in label files whose values are lower by one, and 255 for void."""
    ids = tuple(tuple(value - 1 for value in values) for values in classes.ids)
    return classes._replace(ids=ids, void_ids=(IGNORE_LABEL,))


CITYSCAPES = load_classes("cityscapes")
ADE20K = _ade20k_classes()
PASCAL_CONTEXT = load_classes("pascal_context")
COCO_STUFF = load_classes("coco_stuff")
CAMVID = load_classes("camvid")
CAMVID_ORIGINAL = camvid_original_classes()
SHAPES = Classes(
    names=shapes.CLASS_NAMES,
    colors=shapes.CLASS_COLORS,
    ids=tuple((k,) for k in range(len(shapes.CLASS_NAMES))),
    void_ids=(shapes.VOID_ID,),
)


def _rows(
    name: str,
    classes: Classes,
    load: Callable[..., list[Record]] | None,
    splits: Mapping[str, Sequence[str]],
    contiguous_labels: bool = False,
) -> list[Dataset]:
    """One row per split; its arguments to ``load`` are the owner's names of the split's parts."""
    return [
        Dataset(
            f"{name}{_SEPARATOR}{split}",
            None if load is None else partial(load, *parts),
            classes,
            contiguous_labels,
        )
        for split, parts in splits.items()
    ]


_TRAIN_VAL = {"train": ["train"], "val": ["val"]}
_TRAIN_VAL_TEST = {**_TRAIN_VAL, "test": ["test"]}
_TEST_IMAGES = {"test_images": ["test"]}  # without the dummy labels that are published for them
_WITH_TRAINVAL = {**_TRAIN_VAL_TEST, "trainval": ["train", "val"]}
_COCO_SPLITS = {"train": ["train2017"], "val": ["val2017"]}

DATASETS = (
    *_rows("camvid", CAMVID, sources.camvid, _WITH_TRAINVAL),
    *_rows("camvid_original", CAMVID_ORIGINAL, sources.camvid_original, _TRAIN_VAL_TEST),
    *_rows("cityscapes_fine", CITYSCAPES, None, _TRAIN_VAL_TEST, True),
    *_rows("cityscapes_fine", CITYSCAPES, sources.cityscapes_trainval, {"trainval": []}, True),
    *_rows("cityscapes_fine", CITYSCAPES, sources.cityscapes_images, _TEST_IMAGES, True),
    *_rows("ade20k", ADE20K, None, _TRAIN_VAL, True),
    *_rows("pascal_context_60", PASCAL_CONTEXT, sources.pascal_context, _TRAIN_VAL),
    *_rows(
        "pascal_context_59",
        _without_background(PASCAL_CONTEXT),
        sources.pascal_context,
        _TRAIN_VAL,
    ),
    *_rows(
        "coco_stuff_10k", COCO_STUFF, sources.coco_stuff_10k, {"train": ["train"], "test": ["test"]}
    ),
    *_rows("coco_stuff_164k", _less_one(COCO_STUFF), sources.coco_stuff_164k, _COCO_SPLITS),
    *(
        row
        for task in (1, 2, 3)
        for row in _rows(
            f"cadis_task{task}", load_classes(f"cadis_task{task}"), sources.cadis, _TRAIN_VAL_TEST
        )
    ),
    *_rows("shapes", SHAPES, shapes.load_shapes, _TRAIN_VAL),
)


def register_datasets(datasets: Iterable[Dataset] = DATASETS) -> None:
    """Registers datasets in detectron2's DatasetCatalog and MetadataCatalog.

    A name that is registered already is left as it is. Entries of detectron2's own get the
    metadata that they lack, such as colours and the label of void. Nothing is read from disk.

    Args:
        datasets: rows to register.
    """
    for row in datasets:
        if row.load is not None:
            if row.name in DatasetCatalog:
                continue
            DatasetCatalog.register(row.name, row.load)
        metadata = MetadataCatalog.get(row.name)
        present = metadata.as_dict()
        new = {key: value for key, value in _metadata(row).items() if key not in present}
        metadata.set(**new)


def _metadata(row: Dataset) -> dict[str, Any]:
    values = {
        "evaluator_type": "sem_seg",
        "ignore_label": IGNORE_LABEL,
        "stuff_classes": list(row.classes.names),
        "stuff_colors": [list(color) for color in row.classes.colors],
        "stuff_dataset_id_to_contiguous_id": row.classes.id_to_class,
        "class_groups": dict(row.classes.groups),
    }
    # Its presence says that label files hold other than contiguous ids; see LabelMap.
    return values if row.contiguous_labels else {**values, "void_dataset_ids": row.classes.void_ids}


def register_folder(path: str, name: str | None = None) -> list[str]:
    """Registers the splits of a folder of images and label PNGs.

    The folder holds a ``dataset.json``, see ``folder``. A folder in ``$DETECTRON2_DATASETS`` needs
    no registration: its splits are found by their names.

    Args:
        path: of the folder.
        name: start of the names; default: the folder's own name.

    Returns:
        The names, ``NAME_sem_seg_SPLIT``. Those that are registered already stay as they are.

    Raises:
        ValueError: if the description is missing or wrong.
    """
    path = os.path.abspath(os.path.expanduser(path))
    name = name or os.path.basename(path)
    description = read_folder(path)
    rows = [
        Dataset(
            f"{name}{_SEPARATOR}{split}",
            partial(load_folder_split, path, split),
            description.classes,
        )
        for split in description.splits
    ]
    register_datasets(rows)
    return [row.name for row in rows]


def check_registered(name: str) -> None:
    """Raises ValueError, with the nearest names, if there is no dataset of a name.

    Registers ``FOLDER_sem_seg_SPLIT`` when ``$DETECTRON2_DATASETS/FOLDER`` has a ``dataset.json``.
    """
    if name in DatasetCatalog:
        return
    stem, separator, _ = name.rpartition(_SEPARATOR)
    folder = os.path.join(datasets_root(), stem)
    if separator and PathManager.isfile(os.path.join(folder, FILE_NAME)):
        if name in register_folder(folder):
            return
    known = list(DatasetCatalog.keys())
    siblings = [other for other in known if separator and other.startswith(stem + separator)]
    nearest = difflib.get_close_matches(name, siblings or known, n=3)
    hints = [f"did you mean {' or '.join(nearest)}?"] if nearest else []
    if separator and not siblings:
        hints.append(f"if it is a folder of yours, put a {FILE_NAME} into {folder}")
    hint = "; ".join(hints) or "see DatasetCatalog.list()"
    raise ValueError(f"Dataset {name!r} is not registered: {hint}")


def read_records(name: str) -> list[Record]:
    """The records of a dataset, sorted by the names of their images.

    detectron2 lists some datasets in the order of the disk; sorted, every machine sees one order.

    Args:
        name: of a registered dataset.

    Raises:
        ValueError: an unknown name, or files that are missing.
    """
    check_registered(name)
    try:
        records = DatasetCatalog.get(name)
    except (AssertionError, OSError) as error:  # of detectron2's own entries
        reason = " ".join(str(error).split()) or type(error).__name__
        known = [key for key in _PREPARED if name.startswith(key)]
        prepare = f", or run python tools/prepare_dataset.py {_PREPARED[known[0]]}" if known else ""
        raise ValueError(
            f"{name} cannot be listed ({reason}). Set DETECTRON2_DATASETS to the folder that holds "
            f"the datasets before the program starts{prepare}"
        ) from error
    return sorted(records, key=lambda record: record["file_name"])


def num_classes(dataset: str | Sequence[str]) -> int:
    """Number of classes of a dataset, or of the first of several.

    In experiment files, as ``"${num_classes:${dataset.train}}"``, it follows the dataset that the
    command line chooses.

    Raises:
        ValueError: if the dataset is not registered.
    """
    name = dataset if isinstance(dataset, str) else dataset[0]
    check_registered(name)
    return len(MetadataCatalog.get(name).stuff_classes)


OmegaConf.register_new_resolver("num_classes", num_classes, replace=True)
