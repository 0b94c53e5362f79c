"""The trivial predictor that a trained model has to beat: it never looks at the image.

Shape letters: K classes, H W.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from torch import Tensor, nn

from contrast_d2.data.datasets import check_registered, read_records
from contrast_d2.data.labels import LabelMap, load_labels

from .evaluator import SemSegEvaluator


class PositionPrior(nn.Module):
    """Predict at each pixel the class that is most frequent there, whatever the image.

    Args:
        labels: (H, W) integers in 0..K-1, the class at each position.
        num_classes: K.
    """

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.labels: Tensor
        self.register_buffer("labels", labels.long())

    def forward(self, batched_inputs: Sequence[dict]) -> list[dict[str, Tensor]]:
        """Give every input the same prediction, at its `height` and `width`.

        Returns:
            One {"sem_seg": (K, H, W)} per input, 1 for the predicted class and 0 elsewhere.
        """
        return [
            {"sem_seg": self._scores(image["height"], image["width"])} for image in batched_inputs
        ]

    def _scores(self, height: int, width: int) -> Tensor:
        labels_HW = _resize_labels(self.labels, (height, width))
        return F.one_hot(labels_HW, self.num_classes).permute(2, 0, 1)


def most_frequent_labels(
    label_maps: Iterable[np.ndarray], num_classes: int, ignore_label: int
) -> Tensor:
    """Find the most frequent class at each pixel position.

    Ties go to the class with more pixels overall, as do positions that are never labelled.

    Args:
        label_maps: (H, W) integers in 0..K-1 or `ignore_label`, which is not counted; maps of
            another size than the first are resized to it, nearest.
        num_classes: K.
        ignore_label: the label that is not counted.

    Returns:
        (H, W) int64, in 0..K-1.

    Raises:
        ValueError: there is no labelled pixel.
    """
    counts_KHW = np.zeros((num_classes, 0, 0), dtype=np.int32)
    for i, label_map in enumerate(label_maps):
        if i == 0:
            counts_KHW = np.zeros((num_classes, *label_map.shape), dtype=np.int32)
        labels_HW = _resize_labels(torch.from_numpy(label_map), counts_KHW.shape[1:]).numpy()
        rows, columns = np.nonzero(labels_HW != ignore_label)
        counts_KHW[labels_HW[rows, columns], rows, columns] += 1
    pixels_K = counts_KHW.sum(axis=(1, 2), dtype=np.int64)
    if not pixels_K.any():
        raise ValueError("no label map holds a labelled pixel, so there is nothing to count")
    # argmax takes the first of equals: order the classes by their pixels.
    order = np.argsort(-pixels_K, kind="stable")
    return torch.from_numpy(order[counts_KHW[order].argmax(axis=0)])


def evaluate_position_prior(
    train: str, evaluate: str, *, output_dir: str | None = None
) -> OrderedDict:
    """Score the position prior of one dataset on another.

    Args:
        train: dataset whose labels are counted.
        evaluate: dataset that is predicted; its records have `height` and `width`.
        output_dir: see `SemSegEvaluator`.

    Returns:
        The results of `SemSegEvaluator`.

    Raises:
        ValueError: a dataset is not registered, the two have different classes, or no pixel is
            labelled.
    """
    for name in (train, evaluate):
        check_registered(name)
    train_meta, meta = MetadataCatalog.get(train), MetadataCatalog.get(evaluate)
    records, train_records = read_records(evaluate), read_records(train)
    if list(train_meta.stuff_classes) != list(meta.stuff_classes):
        raise ValueError(
            f"{train} has the classes {train_meta.stuff_classes}, but {evaluate} has "
            f"{meta.stuff_classes}; choose two splits of one dataset"
        )
    num_classes = len(meta.stuff_classes)
    label_map = LabelMap.from_metadata(train_meta)
    label_maps = (load_labels(record["sem_seg_file_name"], label_map) for record in train_records)
    labels_HW = most_frequent_labels(label_maps, num_classes, train_meta.ignore_label)
    evaluator = SemSegEvaluator(evaluate, distributed=False, output_dir=output_dir)
    prior = PositionPrior(labels_HW, num_classes)
    return inference_on_dataset(prior, [[record] for record in records], evaluator)


def _resize_labels(labels_HW: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (H, W) integers to `size` (height, width), nearest."""
    if tuple(labels_HW.shape) == tuple(size):
        return labels_HW
    resized = F.interpolate(labels_HW[None, None].double(), size=tuple(size), mode="nearest-exact")
    return resized[0, 0].to(labels_HW.dtype)
