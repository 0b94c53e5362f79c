"""Lists the images of a dataset together with their label files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from detectron2.utils.file_io import PathManager

from .reading import READ_ERRORS, open_image

Record = dict[str, Any]

# Of `IMAGE_FORMATS`, in any case.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABEL_SUFFIX = ".png"

# EXIF tag 274, orientation: these values swap width and height. detectron2 turns such images
# upright when it reads them.
_EXIF_ORIENTATION, _EXIF_TRANSPOSED = 274, (5, 6, 7, 8)


class Folders(NamedTuple):
    """Where some images of a dataset and their label files lie.

    An image ``NAME`` + image suffix belongs to the label file ``NAME`` + label suffix. Both may lie
    in folders below, which are then part of the NAME, and their suffixes be of any case.
    """

    images: str
    """Folder of the images, relative to the root."""
    labels: str | None
    """Folder of the label files, relative to the root; None for a split without labels."""
    image_suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    label_suffix: str = LABEL_SUFFIX
    names: Sequence[str] | None = None
    """Which images, without suffix; None takes all of the folder. Every one has to be there."""
    missing_labels: str = "add it or remove the image"
    """What to do where a label file is missing, for the message."""


class BrokenFilesError(ValueError):
    """Files of a dataset are missing or cannot be read.

    Args:
        problems: a sentence for each file, without a full stop; the first one is the message.
        records: of the images that are whole, for those who go on without the others.
    """

    def __init__(self, problems: Sequence[str], records: Sequence[Record]) -> None:
        more = f"; {len(problems) - 1:,} more files have such faults" if len(problems) > 1 else ""
        super().__init__(f"{problems[0]}{more}. tools/check_dataset.py lists all")
        self.problems = tuple(problems)
        self.records = list(records)


def datasets_root() -> str:
    """The folder that ``DETECTRON2_DATASETS`` names now; ``datasets`` where it is not set."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def root_hint(root: str) -> str:
    """A sentence that says where the folders under a root are looked for."""
    if root != datasets_root():
        return f"Correct the folders that dataset.json of {root} names"
    return f"Set DETECTRON2_DATASETS (now {root!r}) to the folder that holds the datasets"


def pair_files(root: str, parts: Sequence[Folders]) -> list[Record]:
    """Pairs images with label files by name, without opening any.

    Args:
        root: folder of all datasets.
        parts: folders that make up the split, in order.

    Returns:
        One record per image, sorted by name within each part, with ``file_name``, ``image_id``
        (the NAME) and, where the split has labels, ``sem_seg_file_name``.

    Raises:
        BrokenFilesError: if listed images or label files are missing.
        ValueError: if a folder is missing, or there is no image.
    """
    records: list[Record] = []
    problems: list[str] = []
    for part in parts:
        in_part, problems_of_part = _pair_part(root, part)
        records += in_part
        problems += problems_of_part
    if problems:
        raise BrokenFilesError(problems, records)
    return records


def _pair_part(root: str, part: Folders) -> tuple[list[Record], list[str]]:
    """The records of a part, and what is wrong with the others."""
    image_dir = os.path.join(root, part.images)
    images = _images_by_name(image_dir, part, root)
    names = sorted(images) if part.names is None else part.names
    problems = [
        f"The dataset folder {image_dir} lacks the image {name}{part.image_suffixes[0]}, which its "
        "split lists: is the download complete?"
        for name in names
        if name not in images
    ]
    records = [
        {"file_name": os.path.join(image_dir, images[name]), "image_id": name}
        for name in names
        if name in images
    ]
    if part.labels is None:
        return records, problems
    label_dir = os.path.join(root, part.labels)
    if not PathManager.isdir(label_dir):
        raise ValueError(
            f"The dataset folder {label_dir} does not exist. {_labels_hint(part)}{root_hint(root)}"
        )
    labels = _by_name(label_dir, (part.label_suffix,))
    labelled = []
    for record in records:
        name = record["image_id"]
        label = labels.get(name, name + part.label_suffix)
        record["sem_seg_file_name"] = os.path.join(label_dir, label)
        if name in labels:
            labelled.append(record)
        else:
            problems.append(
                f"The image {record['file_name']} has no label file "
                f"{record['sem_seg_file_name']}: {part.missing_labels} (datasets are looked for "
                f"in {root!r})"
            )
    return labelled, problems


def _labels_hint(part: Folders) -> str:
    default = part.missing_labels == Folders._field_defaults["missing_labels"]
    return "" if default else f"{part.missing_labels[0].upper()}{part.missing_labels[1:]}. "


def _images_by_name(image_dir: str, part: Folders, root: str) -> dict[str, str]:
    """NAME to file name of the images of a folder."""
    if not PathManager.isdir(image_dir):
        raise ValueError(f"The dataset folder {image_dir} does not exist. {root_hint(root)}")
    label_dir = None if part.labels is None else os.path.join(root, part.labels)
    images = _by_name(image_dir, part.image_suffixes, label_dir)
    if not images:
        raise ValueError(
            f"The dataset folder {image_dir} holds no images ({' '.join(part.image_suffixes)}); "
            f"{_contents(image_dir)}. {root_hint(root)}"
        )
    return images


def _by_name(folder: str, suffixes: Sequence[str], without: str | None = None) -> dict[str, str]:
    """NAME to file name of all files below a folder that end so, relative to it.

    Args:
        folder: which exists.
        suffixes: of the files; the first that fits is not part of the NAME.
        without: a folder that is left out, if it lies below.

    Raises:
        ValueError: two files have the same NAME.
    """
    files: dict[str, str] = {}
    for file in _files(folder, tuple(s.lower() for s in suffixes), without):
        suffix = next((s for s in suffixes if file.lower().endswith(s.lower())), None)
        if suffix is None:
            continue
        name = file[: -len(suffix)]
        if name in files:
            raise ValueError(
                f"{folder} holds both {files[name]} and {file}, which have one label file: remove "
                "one"
            )
        files[name] = file
    return files


def _files(folder: str, suffixes: tuple[str, ...], without: str | None = None) -> Iterator[str]:
    """All files below a folder, sorted by folder. What ends in one of the suffixes is taken for a
    file: to ask that of each takes minutes on a network disk."""
    for entry in sorted(PathManager.ls(folder)):
        if entry.startswith("."):  # archives of macOS hold ._NAME files
            continue
        path = os.path.join(folder, entry)
        if entry.lower().endswith(suffixes) or not PathManager.isdir(path):
            yield entry
        elif path != without:
            yield from (f"{entry}/{file}" for file in _files(path, suffixes, without))


def _contents(folder: str) -> str:
    """What lies below a folder, for messages."""
    endings = Counter(os.path.splitext(file)[1] or "no ending" for file in _files(folder, ()))
    if not endings:
        return "it is empty"
    shown = ", ".join(f"{ending} ({count:,})" for ending, count in endings.most_common(5))
    return f"its files end in {shown}"


def add_sizes(records: list[Record]) -> list[Record]:
    """Adds ``height`` and ``width`` (pixels), read from the images' headers, to records.

    Raises:
        BrokenFilesError: if images cannot be read. The message names the first.
    """
    problems, readable = [], []
    for record in records:
        try:
            record["height"], record["width"] = _image_size(record["file_name"])
            readable.append(record)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise BrokenFilesError(problems, readable)
    return records


def load_folders(*folders: tuple[str, str]) -> list[Record]:
    """Lists the images of one or more folders together with their label files.

    ``NAME.jpg`` (or .png, .tif, .bmp, .webp) belongs to ``NAME.png`` of the label folder.

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
    return add_sizes(pair_files(datasets_root(), [Folders(*pair) for pair in folders]))


def read_names(path: str) -> list[str]:
    """Reads the names that a split file lists, one in each line.

    Raises:
        ValueError: if the file cannot be read, is empty or lists a name twice.
    """
    try:
        with PathManager.open(path, "r") as file:
            names = [line.split()[0] for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read the split file {path}: {error}") from error
    if not names:
        raise ValueError(f"The split file {path} lists no image")
    if len(set(names)) < len(names):
        twice = [name for name, count in Counter(names).items() if count > 1][:3]
        raise ValueError(f"The split file {path} lists images twice, as {', '.join(twice)}")
    return names


def _image_size(path: str) -> tuple[int, int]:
    """Reads (height, width) from an image's header, as detectron2 will orient it."""
    try:
        with PathManager.open(path, "rb") as file, open_image(file) as image:
            width, height = image.size
            orientation = image.getexif().get(_EXIF_ORIENTATION)
    except READ_ERRORS as error:
        raise ValueError(f"Cannot read the image {path}: {error}") from error
    return (width, height) if orientation in _EXIF_TRANSPOSED else (height, width)
