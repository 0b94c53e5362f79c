"""What `SemSegEvaluator` can count besides the confusion matrix.

Shape letters: K classes, H W.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from detectron2.data import MetadataCatalog
from torch import Tensor

from contrast_d2.data.datasets import check_registered

from .metrics import AbsentClasses


class Measure(ABC):
    """Scores from a tensor of counts, which is summed over the images and over the processes.

    Args:
        dataset_name: the dataset that is evaluated.

    Raises:
        ValueError: the dataset is not registered.
    """

    def __init__(self, dataset_name: str) -> None:
        check_registered(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        self.dataset_name = dataset_name
        self.class_names = tuple(metadata.stuff_classes)
        self.ignore_label: int = metadata.ignore_label

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @abstractmethod
    def count(self, predictions_HW: Tensor, labels_HW: Tensor, label_file: str) -> Tensor:
        """Counts of one image.

        Args:
            predictions_HW: (H, W) uint8 in 0..K-1.
            labels_HW: (H, W) uint8 in 0..K-1 or `ignore_label`, on the same device.
            label_file: where the labels come from.

        Returns:
            Counts of the same shape for every image, int64 or fp64.
        """

    @abstractmethod
    def scores(
        self, counts: Tensor, confusion: Tensor, absent_classes: AbsentClasses
    ) -> dict[str, float]:
        """Scores of the whole dataset.

        Args:
            counts: sum of what `count` returned, on the CPU.
            confusion: (K, K) int64 of the whole dataset, rows are true classes, on the CPU.
            absent_classes: how classes absent from the ground truth enter means, see
                `segmentation_scores`.

        Returns:
            Scores in 0..1, nan where there is nothing to measure, by their names.
        """
