"""A folder of images and label PNGs, described by a ``dataset.json`` in it.

my_data/
    dataset.json                {"classes": ["road", "car"]}
    images/train/NAME.jpg       or .png, .tif, .bmp, .webp; also in folders below
    annotations/train/NAME.png  values are positions in the list of classes; 255 is void
    images/val/...              one folder per split
    annotations/val/...
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from detectron2.utils.file_io import PathManager

from .classes import Classes, parse_classes, read_json
from .files import LABEL_SUFFIX, Folders, Record, add_sizes, pair_files, read_names

FILE_NAME = "dataset.json"

_KEYS = {"reference", "classes", "void_ids", "groups", "splits"}
_SPLIT_KEYS = {"images", "annotations", "label_suffix", "names"}


class FolderDescription(NamedTuple):
    """What a folder's ``dataset.json`` says."""

    classes: Classes
    splits: dict[str, dict[str, str]]
    """For each split, the entries of `_SPLIT_KEYS` that the file gives."""


def read_folder(path: str) -> FolderDescription:
    """Reads the description of a folder.

    Args:
        path: of the folder.

    Returns:
        Its classes and splits. Without ``splits`` in the file, they are the subfolders of
        ``images``.

    Raises:
        ValueError: if the file is missing or wrong. The message names it and the entry.
    """
    source = os.path.join(path, FILE_NAME)
    if not PathManager.isfile(source):
        raise ValueError(
            f"{source} does not exist: write it, with at least "
            '{"classes": ["name of label value 0", "name of label value 1"]}'
        )
    data = read_json(source)
    if unknown := sorted(data.keys() - _KEYS):
        raise ValueError(f"{source}: unknown entries {unknown}; known are {sorted(_KEYS)}")
    splits = data.get("splits")
    if splits is None:
        splits = {name: {} for name in _subfolders(os.path.join(path, "images"))}
    _check_splits(splits, source)
    return FolderDescription(parse_classes(data, source), splits)


def load_folder_split(path: str, split: str) -> list[Record]:
    """Lists a split of a folder, which is read anew.

    Args:
        path: of the folder.
        split: one of its splits.

    Returns:
        Records in detectron2's dataset format, with sizes.

    Raises:
        ValueError: if the split is unknown, or a file is missing or cannot be read.
    """
    splits = read_folder(path).splits
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r} any more, only {sorted(splits)}")
    entries = splits[split]
    names = entries.get("names")
    part = Folders(
        entries.get("images", f"images/{split}"),
        entries.get("annotations", f"annotations/{split}"),
        label_suffix=entries.get("label_suffix", LABEL_SUFFIX),
        names=None if names is None else read_names(os.path.join(path, names)),
    )
    return add_sizes(pair_files(path, [part]))


def _subfolders(path: str) -> list[str]:
    if not PathManager.isdir(path):
        raise ValueError(
            f"{path} does not exist: put images into images/SPLIT and their labels into "
            f"annotations/SPLIT, or name other folders as 'splits' in {FILE_NAME}"
        )
    return [n for n in sorted(PathManager.ls(path)) if PathManager.isdir(os.path.join(path, n))]


def _check_splits(splits: Any, source: str) -> None:
    if not isinstance(splits, dict) or not splits:
        raise ValueError(
            f"{source} describes no split: put images into images/train and images/val, or name "
            "the folders as 'splits'"
        )
    for split, entries in splits.items():
        if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
            raise ValueError(f"{source}: split {split!r} must be an object of strings: {entries!r}")
        if unknown := sorted(entries.keys() - _SPLIT_KEYS):
            raise ValueError(
                f"{source}: split {split!r} has unknown entries {unknown}; known are "
                f"{sorted(_SPLIT_KEYS)}"
            )
