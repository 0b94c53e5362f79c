"""Predictions as label files, as the test servers of the datasets take them.

Shape letters: K classes, H W.
"""

from __future__ import annotations

import io
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor

from contrast_d2.data.datasets import check_registered, read_records
from contrast_d2.data.files import add_sizes
from contrast_d2.data.reading import READ_ERRORS, open_image

from .metrics import check_finite_scores, predicted_classes

logger = logging.getLogger(__name__)

_MOST_NAMES = 3


class SubmissionWriter(DatasetEvaluator):
    """Write predictions in the ids of the dataset's own label files, one PNG per image, and a zip.

    Cityscapes gets its label ids, 7 for road, which is what its test server takes; ADE20K gets
    1..150, COCO-Stuff the ids of its release. A file has the name of its image. The labels of the
    dataset are not read: it may be a test split that has none.

    Once all images are written, the files are read back: every image of the dataset has one, of
    its size and with ids of the dataset only. Then they are put into `submission.zip`.

    Args:
        dataset_name: a dataset of the DatasetCatalog whose metadata have
            `stuff_dataset_id_to_contiguous_id`, of ids up to 255.
        output_dir: gets the folder `submission` and `submission.zip`.
        distributed: the processes share the images and write to one disk.

    Raises:
        ValueError: the dataset is not registered, its ids are not known or do not fit into a byte,
            or two of its images have one name.
    """

    def __init__(self, dataset_name: str, output_dir: str, *, distributed: bool = True) -> None:
        check_registered(dataset_name)
        ids = MetadataCatalog.get(dataset_name).get("stuff_dataset_id_to_contiguous_id")
        if not ids or max(ids) > 255:
            raise ValueError(
                f"{dataset_name} has no stuff_dataset_id_to_contiguous_id in its metadata with ids "
                f"up to 255, but {ids}: these are what predictions are written with"
            )
        self._dataset_name = dataset_name
        self._folder = os.path.join(output_dir, "submission")
        self._distributed = distributed
        # Of several ids of a class, the first stands for it.
        by_class = {k: dataset_id for dataset_id, k in reversed(ids.items())}
        self._ids_K = np.array([by_class[k] for k in sorted(by_class)], dtype=np.uint8)
        self._records = {r["file_name"]: r for r in read_records(dataset_name)}
        names = Counter(_png_name(file_name) for file_name in self._records)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(
                f"several images of {dataset_name} would be written to one file: {_some(twice)}"
            )
        self.reset()

    def reset(self) -> None:
        """Forgets which images were written; files are overwritten, none is deleted."""
        self._written: list[str] = []
        self._best_scores: dict[str, Tensor] = {}

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Write the predictions of some images.

        Args:
            inputs: the model's inputs; `file_name` of each says which image it is.
            outputs: the model's outputs; `sem_seg` of each is (K, H, W), one score per class, at
                the size of the image.

        Raises:
            ValueError: an image is not of this dataset, or its scores are not (K, H, W).
        """
        PathManager.mkdirs(self._folder)
        for image, output in zip(inputs, outputs, strict=True):
            file_name, scores_KHW = image["file_name"], output["sem_seg"]
            if file_name not in self._records:
                raise ValueError(
                    f"{file_name} is not an image of {self._dataset_name}; predict the dataset "
                    "that the loader reads"
                )
            if scores_KHW.dim() != 3 or len(scores_KHW) != len(self._ids_K):
                raise ValueError(
                    f"{file_name}: the prediction has shape {tuple(scores_KHW.shape)}, but "
                    f"{self._dataset_name} needs ({len(self._ids_K)}, H, W)"
                )
            self._best_scores[file_name] = scores_KHW.amax()
            ids_HW = self._ids_K[predicted_classes(scores_KHW).cpu().numpy()]
            with PathManager.open(self._path(file_name), "wb") as file:
                Image.fromarray(ids_HW).save(file, format="png")
            self._written.append(file_name)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Check all files and pack them.

        Returns:
            {}: there are no scores. None in all but the main process.

        Raises:
            ValueError: an image has no prediction, or a file is not what it should be.
            FloatingPointError: the scores of an image were nan or infinite.
        """
        check_finite_scores(self._best_scores)
        written = [self._written]
        if self._distributed:
            comm.synchronize()
            written = comm.gather(self._written, dst=0)
            if not comm.is_main_process():
                return None
        missing = sorted(set(self._records) - {name for part in written for name in part})
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._records)} images of {self._dataset_name} have no "
                f"prediction: {_some(missing)}. Evaluate the whole dataset"
            )
        for record in self._records.values():
            self._check(record)
        archive = f"{self._folder}.zip"
        with (
            PathManager.open(archive, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed,  # PNGs are compressed
        ):
            for file_name in sorted(self._records):
                with PathManager.open(self._path(file_name), "rb") as png:
                    packed.writestr(_png_name(file_name), png.read())
        logger.info("%d label files, checked and packed: %s", len(self._records), archive)
        return {}

    def _check(self, record: dict) -> None:
        """Raises ValueError unless the file of an image has its size and ids of the dataset."""
        path = self._path(record["file_name"])
        try:
            with PathManager.open(path, "rb") as file, open_image(io.BytesIO(file.read())) as png:
                ids_HW = np.asarray(png)
        except READ_ERRORS as error:
            raise ValueError(f"Cannot read back {path}: {error}") from error
        (sized,) = [record] if "height" in record else add_sizes([dict(record)])
        size = sized["height"], sized["width"]
        if ids_HW.shape != size:
            raise ValueError(
                f"{path} is {ids_HW.shape} (height, width), but its image is {size}; the model "
                "must resize its output to the height and width of its input"
            )
        if strange := sorted(set(np.unique(ids_HW).tolist()) - set(self._ids_K.tolist())):
            raise ValueError(f"{path} holds {strange}, which are no ids of {self._dataset_name}")

    def _path(self, file_name: str) -> str:
        return os.path.join(self._folder, _png_name(file_name))


def _png_name(file_name: str) -> str:
    return os.path.splitext(os.path.basename(file_name))[0] + ".png"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (" ..." if len(names) > _MOST_NAMES else "")
