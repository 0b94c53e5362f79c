"""The scores of Cityscapes' benchmark besides the mIoU: iIoU, and both for categories.

Shape letters: K classes, H W, I instances of an image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import Tensor

from contrast_d2.data.datasets import read_records
from contrast_d2.data.reading import READ_ERRORS, open_image

from .measure import Measure
from .metrics import (
    AbsentClasses,
    mean_over_classes,
    merge_classes,
    ratio_of_present,
    segmentation_scores,
)

# Mean size of an instance in pixels, as the benchmark's own evaluation weights them.
AVERAGE_INSTANCE_SIZES = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}

_LABEL_ENDING, _INSTANCE_ENDING = "_gtFine_labelTrainIds.png", "_gtFine_instanceIds.png"
# An instance has the value 1000 * label id + number; lower values are label ids of what is none.
_IDS_PER_LABEL = 1000
_NUM_IDS = 2**16


class CityscapesScores(Measure):
    """iIoU of classes with instances, IoU and iIoU of categories, as the benchmark defines them.

    In the iIoU, iTP / (iTP + FP + iFN), each true pixel of an instance has the weight of the
    class's mean instance size over the size of the instance, so that small and far objects count
    as much as large ones. False positives are pixels of the confusion matrix, since they belong to
    no instance. In categories, classes are merged: a truck taken for a bus is right. A category
    has an iIoU if all of its classes have instances.

    Scores, by the names of the benchmark's tables: "iIoU", "IoUcat" and "iIoUcat", and those of
    single classes and categories, "iIoU-<class>", "IoUcat-<category>", "iIoUcat-<category>". With
    `absent_classes="zero_if_predicted"` the means are the benchmark's.

    Args:
        dataset_name: a split of Cityscapes with labels. `*_gtFine_instanceIds.png`, of the same
            archive, lie beside the label files.

    Raises:
        ValueError: the dataset is not registered or not Cityscapes, or files of instances are
            missing.

    Reference: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR
        2016, section 3.1, with the details of the benchmark's evaluation code.
    """

    def __init__(self, dataset_name: str) -> None:
        super().__init__(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        self.categories: dict[str, tuple[int, ...]] = dict(metadata.get("class_groups") or {})
        if not self.categories or not set(AVERAGE_INSTANCE_SIZES) <= set(self.class_names):
            raise ValueError(
                f"{dataset_name} has not the classes and categories of Cityscapes: take "
                "CityscapesScores out of its evaluator's measures"
            )
        self._average_size_K = np.array(
            [AVERAGE_INSTANCE_SIZES.get(name, 0.0) for name in self.class_names]
        )
        # By label id: the class, -1 of what has no instances.
        self._class_of_label = np.full(_NUM_IDS // _IDS_PER_LABEL + 1, -1)
        for label_id, k in metadata.stuff_dataset_id_to_contiguous_id.items():
            if self._average_size_K[k]:
                self._class_of_label[label_id] = k
        self._category_of_class = np.empty(self.num_classes, dtype=np.int64)
        for number, members in enumerate(self.categories.values()):
            self._category_of_class[list(members)] = number
        files = [_instance_file(r["sem_seg_file_name"]) for r in read_records(dataset_name)]
        missing = [path for path in files if not PathManager.isfile(path)]
        if missing:
            raise ValueError(
                f"{len(missing)} files of instances of {dataset_name} are missing, as "
                f"{missing[0]}: unpack them from gtFine_trainvaltest.zip, or take CityscapesScores "
                "out of the evaluator's measures"
            )

    def count(self, predictions_HW: Tensor, labels_HW: Tensor, label_file: str) -> Tensor:
        """(3, K) fp64: weighted pixels of the instances of each class, those that are predicted as
        the class, and those that are predicted as a class of its category.

        Raises:
            ValueError: the file of instances cannot be read or has another size.
        """
        path = _instance_file(label_file)
        instances_HW, predicted_HW = _load_instances(path), predictions_HW.cpu().numpy()
        if instances_HW.shape != predicted_HW.shape:
            raise ValueError(
                f"{path} is {instances_HW.shape} (height, width), but the prediction is "
                f"{predicted_HW.shape}: it is of another release than the labels"
            )
        sizes = np.bincount(instances_HW.ravel(), minlength=_NUM_IDS)
        class_of_id = self._class_of_label[np.arange(_NUM_IDS) // _IDS_PER_LABEL]
        ids_I = np.flatnonzero((sizes > 0) & (class_of_id >= 0))
        counts = np.zeros((3, self.num_classes))
        # Few pixels belong to instances: only those are looked at.
        within = class_of_id[instances_HW] >= 0
        instances, predictions = instances_HW[within], predicted_HW[within]
        truth, categories = class_of_id[instances], self._category_of_class
        kinds = (
            np.ones_like(truth, dtype=bool),
            truth == predictions,
            categories[truth] == categories[predictions],
        )
        for row, kind in zip(counts, kinds, strict=True):
            pixels_I = np.bincount(instances[kind], minlength=_NUM_IDS)[ids_I]
            classes_I = class_of_id[ids_I]
            weighted_I = pixels_I * self._average_size_K[classes_I] / sizes[ids_I]
            np.add.at(row, classes_I, weighted_I)
        return torch.from_numpy(counts)

    def scores(
        self, counts: Tensor, confusion: Tensor, absent_classes: AbsentClasses
    ) -> dict[str, float]:
        """See `Measure.scores`."""
        categories = merge_classes(confusion, self.categories)
        category_scores = segmentation_scores(categories, absent_classes=absent_classes)
        truth_K, right_K, right_category_K = counts.numpy()
        with_instances = np.flatnonzero(self._average_size_K)
        class_iiou, class_miiou = _weighted_iou(
            truth_K[with_instances],
            right_K[with_instances],
            _false_positives(confusion)[with_instances],
            absent_classes,
        )
        numbers = [
            number
            for number, members in enumerate(self.categories.values())
            if self._average_size_K[list(members)].all()
        ]
        groups = [list(members) for members in self.categories.values()]
        category_iiou, category_miiou = _weighted_iou(
            np.array([truth_K[groups[number]].sum() for number in numbers]),
            np.array([right_category_K[groups[number]].sum() for number in numbers]),
            _false_positives(categories)[numbers],
            absent_classes,
        )
        classes, names = [self.class_names[k] for k in with_instances], list(self.categories)
        return {
            "iIoU": class_miiou,
            "IoUcat": category_scores.miou,
            "iIoUcat": category_miiou,
            **_named("iIoU", classes, class_iiou),
            **_named("IoUcat", names, category_scores.class_iou),
            **_named("iIoUcat", [names[number] for number in numbers], category_iiou),
        }


def _false_positives(confusion: Tensor) -> np.ndarray:
    return (confusion.sum(dim=0) - confusion.diagonal()).numpy()


def _weighted_iou(
    truth: np.ndarray, right: np.ndarray, false_positives: np.ndarray, policy: AbsentClasses
) -> tuple[np.ndarray, float]:
    """The iIoU of each class, and their mean."""
    union = truth + false_positives
    iiou = ratio_of_present(right, union, truth)
    return iiou, mean_over_classes(iiou, union, policy)


def _named(score: str, names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {f"{score}-{name}": float(v) for name, v in zip(names, values, strict=True)}


def _instance_file(label_file: str) -> str:
    return label_file.removesuffix(_LABEL_ENDING) + _INSTANCE_ENDING


def _load_instances(path: str) -> np.ndarray:
    """(H, W) integers as stored, up to 65535."""
    try:
        with PathManager.open(path, "rb") as file, open_image(io.BytesIO(file.read())) as image:
            instances = np.asarray(image)
    except READ_ERRORS as error:
        raise ValueError(f"Cannot read the file of instances {path}: {error}") from error
    if instances.ndim != 2 or instances.dtype.kind not in "iu" or instances.dtype == np.uint8:
        raise ValueError(f"{path} must have one channel of 16 bits, as Cityscapes' files have")
    return instances
