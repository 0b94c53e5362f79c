"""Label files to contiguous class ids.

H, W: height and width of one label map. K: number of classes, whose contiguous ids are 0..K-1.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.file_io import PathManager

from .reading import READ_ERRORS, decode_png, open_image

IGNORE_LABEL = 255

# Label files have 8 or 16 bits. One more slot stands for every value outside that range.
_NUM_IDS = 2**16
_ILLEGAL = -1

# The single-channel modes in which PIL hands back the stored integers. Palette images ("P") are
# indices, their colours are decoration.
LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


@dataclass(frozen=True)
class LabelMap:
    """The mapping from the values in a dataset's label files to contiguous class ids.

    Args:
        id_to_class: label value (0..65535) to contiguous class id; together the class ids must be
            0..K-1 with K at most 255. Several values may share one class.
        void_ids: label values (0..65535) that mean "not labelled".
        ignore_label: what void becomes, in 0..255 and not a class id.
        dataset_name: used in error messages only.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    id_to_class: Mapping[int, int]
    void_ids: tuple[int, ...] = ()
    ignore_label: int = IGNORE_LABEL
    dataset_name: str = field(default="this dataset", compare=False)
    _table: np.ndarray = field(init=False, repr=False, compare=False)
    _byte_table: bytes | None = field(init=False, repr=False, compare=False)
    _byte_illegal: int | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        classes = sorted(set(self.id_to_class.values()))
        if classes != list(range(len(classes))) or not 1 <= len(classes) <= 255:
            raise ValueError(
                f"Class ids of {self.dataset_name} must be 0..K-1 with 1 <= K <= 255, got {classes}"
            )
        if not 0 <= self.ignore_label <= 255 or self.ignore_label in classes:
            raise ValueError(
                f"ignore_label of {self.dataset_name} must lie in 0..255 and outside the class ids "
                f"0..{len(classes) - 1}, got {self.ignore_label}"
            )
        twice = sorted(set(self.id_to_class) & set(self.void_ids))
        if twice:
            raise ValueError(f"Label values {twice} of {self.dataset_name} are a class and void")
        outside = [i for i in (*self.id_to_class, *self.void_ids) if not 0 <= i < _NUM_IDS]
        if outside:
            raise ValueError(f"Label values must lie in 0..{_NUM_IDS - 1}, got {outside}")
        table = np.full(_NUM_IDS + 1, _ILLEGAL, dtype=np.int16)
        table[list(self.id_to_class)] = list(self.id_to_class.values())
        table[list(self.void_ids)] = self.ignore_label
        object.__setattr__(self, "_table", table)
        # What stands for illegal values among 8-bit results: of 256, K + 1 are taken.
        byte_illegal = next((i for i in range(256) if i not in (*classes, self.ignore_label)), None)
        object.__setattr__(self, "_byte_illegal", byte_illegal)
        byte_table = None
        if byte_illegal is not None:
            byte_table = bytes(byte_illegal if i == _ILLEGAL else int(i) for i in table[:256])
        object.__setattr__(self, "_byte_table", byte_table)

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> LabelMap:
        """Builds the map of a registered dataset.

        detectron2 uses ``stuff_dataset_id_to_contiguous_id`` to write predictions, and expects
        contiguous ids in the label files. Our own datasets keep their published label files and
        say so by ``void_dataset_ids`` (possibly empty): only then is the mapping applied to labels.
        Without it, values 0..K-1 are the classes and ``ignore_label`` is void.

        Args:
            metadata: ``MetadataCatalog.get(name)``, with ``stuff_classes`` and ``ignore_label``.

        Raises:
            ValueError: if the metadata lacks a key or contradicts itself.
        """
        for key in ("stuff_classes", "ignore_label"):
            if metadata.get(key) is None:
                raise ValueError(
                    f"Dataset {metadata.name!r} has no metadata {key!r}. Is the name right? If the "
                    f"dataset is yours, set MetadataCatalog.get({metadata.name!r}).{key}"
                )
        void_ids = metadata.get("void_dataset_ids")
        if void_ids is None:
            id_to_class = {i: i for i in range(len(metadata.stuff_classes))}
            void_ids = (metadata.ignore_label,)
        else:
            id_to_class = dict(metadata.stuff_dataset_id_to_contiguous_id)
        num_classes = len(set(id_to_class.values()))
        if num_classes != len(metadata.stuff_classes):
            raise ValueError(
                f"Dataset {metadata.name!r} names {len(metadata.stuff_classes)} classes but maps "
                f"its label values to {num_classes}: correct its metadata"
            )
        return cls(id_to_class, tuple(void_ids), metadata.ignore_label, metadata.name)

    @property
    def num_classes(self) -> int:
        """Number of classes K; the ignored label is not one of them."""
        return len(set(self.id_to_class.values()))

    def apply(self, array: np.ndarray, source: str) -> np.ndarray:
        """Maps label values to contiguous class ids.

        Args:
            array: (H, W) integers as stored in the label file.
            source: the file's name, for error messages.

        Returns:
            (H, W) uint8, values in 0..K-1 or ``ignore_label``.

        Raises:
            ValueError: if the array is not a (H, W) integer array, or holds a value that is
                neither a class nor void.
        """
        if array.ndim != 2 or array.dtype.kind not in "iub":
            raise ValueError(
                f"{source}: labels must be an (H, W) array of integers, got shape {array.shape} "
                f"of {array.dtype}"
            )
        index = array.astype(np.uint8) if array.dtype == bool else array
        if index.dtype == np.uint8 and self._byte_table is not None:
            # Ten times as fast as indexing. What is illegal takes the way below, to be named.
            mapped = bytearray(np.ascontiguousarray(index)).translate(self._byte_table)
            assert self._byte_illegal is not None
            if self._byte_illegal not in mapped:
                return np.frombuffer(mapped, np.uint8).reshape(array.shape)
        if index.dtype not in (np.uint8, np.uint16):
            index = np.where((index >= 0) & (index < _NUM_IDS), index, _NUM_IDS)
        mapped = self._table[index]
        illegal = mapped == _ILLEGAL
        if illegal.any():
            raise ValueError(
                f"{source}: {int(illegal.sum())} of {array.size} pixels hold label values "
                f"{np.unique(array[illegal]).tolist()} that {self.dataset_name} does not define; "
                f"its classes are {_ranges(self.id_to_class)} and its void values are "
                f"{_ranges(self.void_ids) or 'none'}. Correct the file or the dataset's metadata"
            )
        return mapped.astype(np.uint8)


def load_labels(path: str, label_map: LabelMap) -> np.ndarray:
    """Reads a label image as contiguous class ids.

    Args:
        path: a single-channel image of 1, 8 or 16 bits or a palette image, opened through
            detectron2's PathManager.
        label_map: the dataset's map.

    Returns:
        (H, W) uint8, values in 0..K-1 or ``label_map.ignore_label``.

    Raises:
        ValueError: if the file cannot be read, has several channels, or holds a value that is
            neither a class nor void. The message names the file.
    """
    try:
        with PathManager.open(path, "rb") as file:
            data = file.read()
        array, mode = decode_png(data, channels=1), "L"
        if array is None:
            with open_image(io.BytesIO(data)) as image:
                array, mode = np.asarray(image), image.mode
    except READ_ERRORS as error:
        raise ValueError(f"Cannot read the label image {path}: {error}") from error
    if mode not in LABEL_MODES:
        raise ValueError(
            f"{path}: a label image needs one channel of class ids, this one has mode {mode!r}. "
            "Convert colours to ids first"
        )
    return label_map.apply(array, path)


def _ranges(values: Iterable[int]) -> str:
    """Writes integers compactly: (0, 1, 2, 7) is "0-2, 7"."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
