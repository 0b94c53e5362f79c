"""detectron2's evaluator of semantic segmentation, with the counting done on the device.

Shape letters: K classes, H W.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as DetectronSemSegEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch import Tensor

from contrast_d2.data.class_counts import count_classes
from contrast_d2.data.datasets import check_registered, read_records
from contrast_d2.data.labels import LabelMap, load_labels

from ..files import stop_when_disk_is_full
from .confusion_files import write_confusion_csv, write_confusion_picture
from .inference import to_device
from .measure import Measure
from .metrics import (
    AbsentClasses,
    check_absent_classes,
    check_finite_scores,
    count_pairs,
    finite_scores,
    frequency_groups,
    group_miou,
    predicted_classes,
    segmentation_scores,
)

logger = logging.getLogger(__name__)


class SemSegEvaluator(DetectronSemSegEvaluator):
    """detectron2's evaluator, which counts on the device of the predictions.

    `evaluate` is detectron2's, with groups, measures and files added to what it returns. No
    prediction is copied to the host, and none is encoded unless `save_predictions` asks for it.

    Args:
        dataset_name: a dataset of the DatasetCatalog whose records have `sem_seg_file_name`.
        distributed: gather the counts of all processes; the main process returns the results.
        output_dir: folder for `sem_seg_evaluation.pth` (detectron2's),
            `sem_seg_evaluation.json` (dataset, number of images, policy and the scores, nan as
            null), `confusion_matrix.csv` (pixels) and `confusion_matrix.png` (percent); None
            writes nothing.
        absent_classes: how classes absent from the ground truth enter the means, see
            `segmentation_scores`: v0.6 and later versions of detectron2 differ. The default gives
            the numbers of v0.6.
        save_predictions: also write `sem_seg_predictions.json`, run-length encoded masks in COCO's
            format, as detectron2's evaluator does.
        measures: what else is counted, each for the same dataset; such as `BoundaryIoU`.
        train_dataset: name or names of the training set; its label files, counted once, divide
            the classes into head, mid and tail, see `frequency_groups`.

    Raises:
        ValueError: the dataset is not registered or has no labels, `absent_classes` is unknown,
            predictions shall be saved nowhere, a measure is for another dataset, or the training
            set has other classes.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: str | None = None,
        absent_classes: AbsentClasses = "zero_if_predicted",
        save_predictions: bool = False,
        measures: Sequence[Measure] = (),
        train_dataset: str | Sequence[str] | None = None,
    ) -> None:
        check_absent_classes(absent_classes)
        if save_predictions and not output_dir:
            raise ValueError("save_predictions=True needs an output_dir to save them in")
        check_registered(dataset_name)
        for measure in measures:
            if measure.dataset_name != dataset_name:
                raise ValueError(
                    f"a {type(measure).__name__} is for {measure.dataset_name}, but "
                    f"{dataset_name} is evaluated: give both one dataset_name"
                )
        _check_labels(dataset_name)
        # Later versions than v0.6 warn where they cannot compute a boundary IoU. Ours is a measure.
        host = logging.getLogger(DetectronSemSegEvaluator.__module__)
        host.disabled = True
        try:
            super().__init__(dataset_name, distributed=distributed, output_dir=output_dir)
        finally:
            host.disabled = False
        self._compute_boundary_iou = False
        self._measures = tuple(measures)
        # Groups that the dataset defines, and then those by frequency.
        self._groups = dict(MetadataCatalog.get(dataset_name).get("class_groups") or {})
        if train_dataset is not None:
            self._groups |= frequency_groups(_training_pixels(train_dataset, self._class_names))
        self._label_map = LabelMap.from_metadata(MetadataCatalog.get(dataset_name))
        self._absent_classes: AbsentClasses = absent_classes
        self._save_predictions = save_predictions

    @property
    def score_names(self) -> set[str] | None:
        """Names of all scores; None where measures have more."""
        if self._measures:
            return None
        by_class = {f"{kind}-{name}" for kind in ("IoU", "ACC") for name in self._class_names}
        groups = {f"mIoU-{name}" for name in self._groups}
        return {"mIoU", "fwIoU", "mACC", "pACC", *groups, *by_class}

    def reset(self) -> None:
        """Forget everything counted so far."""
        super().reset()
        self._confusion: Tensor | None = None  # (K, K) int64, on the device of the predictions
        self._counts: list[Tensor | None] = [None] * len(self._measures)
        self._num_images = 0
        self._best_scores: dict[str, Tensor] = {}  # of each image, on its device until the end

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Count the pixels of some images.

        Args:
            inputs: the model's inputs; `file_name` of each says which image it is.
            outputs: the model's outputs; `sem_seg` of each is (K, H, W), one score per class, at
                the size of the label image.

        Raises:
            ValueError: an image is not of this dataset, its scores are not (K, H, W), or their
                size is not that of the labels.
        """
        for image, output in zip(inputs, outputs, strict=True):
            label_file = self._label_file(image["file_name"])
            scores_KHW = output["sem_seg"]
            if scores_KHW.dim() != 3 or scores_KHW.shape[0] != self._num_classes:
                raise ValueError(
                    f"{image['file_name']}: the prediction has shape {tuple(scores_KHW.shape)}, "
                    f"but {self._dataset_name} needs one score per class and pixel, "
                    f"({self._num_classes}, H, W); set the model's num_classes to match"
                )
            predictions_HW = predicted_classes(scores_KHW)
            self._best_scores[image["file_name"]] = scores_KHW.amax()
            labels = torch.from_numpy(load_labels(label_file, self._label_map))
            labels_HW = to_device(labels, predictions_HW.device)
            if predictions_HW.shape != labels_HW.shape:
                raise ValueError(
                    f"{image['file_name']}: the prediction is {tuple(predictions_HW.shape)} "
                    f"(height, width), but its labels {label_file} are {tuple(labels_HW.shape)}; "
                    "the model must resize its output to the height and width of its input"
                )
            # Both are legal: by the dataset's map, and as one of K scores.
            counts = count_pairs(predictions_HW, labels_HW, self._num_classes, self._ignore_label)
            self._confusion = _add(self._confusion, counts)
            for i, measure in enumerate(self._measures):
                counts = measure.count(predictions_HW, labels_HW, label_file)
                self._counts[i] = _add(self._counts[i], counts)
            self._num_images += 1
            if self._save_predictions:
                predictions = predictions_HW.cpu().numpy()
                self._predictions += self.encode_json_sem_seg(predictions, image["file_name"])

    def evaluate(self) -> OrderedDict | None:
        """Score what was counted.

        Returns:
            {"sem_seg": {"mIoU", "fwIoU", "IoU-<class>", "mACC", "pACC", "ACC-<class>"}} in
            percent, then "mIoU-<group>" and the scores of the measures; nan for what is absent
            from the ground truth. None in all but the main process.

        Raises:
            FloatingPointError: the scores of an image were nan or infinite.
        """
        check_finite_scores(self._best_scores)
        if self._confusion is not None:
            self._conf_matrix[:-1, :-1] = self._confusion.T.cpu().numpy()  # predicted x true
        parts = [(self._num_images, [None if c is None else c.cpu() for c in self._counts])]
        if self._distributed:
            parts = comm.gather(parts[0], dst=0)
        # Without predictions detectron2 would write an empty list of them.
        folder = self._output_dir
        self._output_dir = folder if self._save_predictions else None
        with np.errstate(invalid="ignore", divide="ignore"):  # where nothing is labelled
            results = super().evaluate()
        self._output_dir = folder
        if results is None:
            return None
        confusion = torch.from_numpy(self._conf_matrix[:-1, :-1].T.copy())
        scores = {name: float(score) for name, score in results["sem_seg"].items()}
        scores |= self._means(confusion)
        scores |= self._score_measures([counts for _, counts in parts], confusion)
        num_images = sum(images for images, _ in parts)
        if folder:
            with stop_when_disk_is_full(folder):
                PathManager.mkdirs(folder)
                self._write_scores(folder, scores, num_images)
            path = os.path.join(folder, "confusion_matrix")
            with stop_when_disk_is_full(folder):
                write_confusion_csv(confusion, self._class_names, path + ".csv")
            try:
                write_confusion_picture(confusion, self._class_names, path + ".png")
            except Exception as error:  # a picture costs no score
                logger.warning("%s.png could not be drawn: %s", path, error)
        self._log_scores(scores, num_images)
        return OrderedDict(sem_seg=scores)

    def _label_file(self, file_name: str) -> str:
        try:
            return self.input_file_to_gt_file[file_name]
        except KeyError:
            raise ValueError(
                f"{file_name} is not an image of {self._dataset_name}; evaluate a model on the "
                "dataset that its loader reads"
            ) from None

    def _means(self, confusion: Tensor) -> dict[str, float]:
        """The means over classes, which depend on how absent ones count, and those of groups."""
        if not confusion.any():
            logger.warning(
                "%s: no labelled pixel was evaluated, so every score is nan", self._dataset_name
            )
        scores = segmentation_scores(confusion, absent_classes=self._absent_classes)
        groups = group_miou(confusion, self._groups, absent_classes=self._absent_classes)
        means = {"mIoU": scores.miou, "fwIoU": scores.fwiou, "mACC": scores.macc}
        means |= {f"mIoU-{name}": score for name, score in groups.items()}
        return {name: 100 * score for name, score in means.items()}

    def _score_measures(
        self, parts: Sequence[Sequence[Tensor | None]], confusion: Tensor
    ) -> dict[str, float]:
        """Scores in percent of what the processes counted; none of what nobody counted."""
        result = {}
        for i, measure in enumerate(self._measures):
            counts = [count for part in parts if (count := part[i]) is not None]
            if counts:
                total = torch.stack(counts).sum(dim=0)
                scores = measure.scores(total, confusion, self._absent_classes)
                result |= {name: 100 * score for name, score in scores.items()}
        return result

    def _write_scores(self, folder: str, scores: dict[str, float], num_images: int) -> None:
        path = os.path.join(folder, "sem_seg_evaluation")
        with PathManager.open(path + ".pth", "wb") as file:
            torch.save(scores, file)
        report = {
            "dataset": self._dataset_name,
            "images": num_images,
            "absent_classes": self._absent_classes,
            "sem_seg": finite_scores(scores),
        }
        with PathManager.open(path + ".json", "w") as file:
            file.write(json.dumps(report, indent=2, allow_nan=False) + "\n")

    def _log_scores(self, scores: dict[str, float], num_images: int) -> None:
        rows = [(name, scores[f"IoU-{name}"], scores[f"ACC-{name}"]) for name in self._class_names]
        table = tabulate(rows, headers=("class", "IoU", "ACC"), floatfmt=".2f")
        logger.info("%s, %d images\n%s", self._dataset_name, num_images, table)
        by_class = {f"{kind}-{name}" for kind in ("IoU", "ACC") for name in self._class_names}
        means = [(name, score) for name, score in scores.items() if name not in by_class]
        logger.info("%s", tabulate(means, headers=("score", "percent"), floatfmt=".2f"))
        absent = [name for name, iou, _ in rows if np.isnan(iou)]
        if absent:
            logger.info(
                'absent from the ground truth of %s (absent_classes="%s"): %s',
                self._dataset_name,
                self._absent_classes,
                ", ".join(absent),
            )


def _add(total: Tensor | None, counts: Tensor) -> Tensor:
    return counts if total is None else total.add_(counts)


def _check_labels(dataset_name: str) -> None:
    for record in read_records(dataset_name):
        if "sem_seg_file_name" not in record:
            raise ValueError(
                f"{dataset_name} has no labels for {record.get('file_name')}, so there is nothing "
                "to compare with; to write predictions for a test server, choose the evaluator "
                "contrast_d2.evaluation.SubmissionWriter"
            )


def _training_pixels(names: str | Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """(K,) pixels of each class in one or several training sets."""
    pixels = np.zeros(len(class_names), dtype=np.int64)
    for name in [names] if isinstance(names, str) else names:
        check_registered(name)
        theirs = MetadataCatalog.get(name).stuff_classes
        if list(theirs) != list(class_names):
            raise ValueError(
                f"train_dataset={name} has {len(theirs)} classes, {', '.join(theirs[:3])} ..., but "
                f"the evaluated dataset has {len(class_names)}, {', '.join(class_names[:3])} ...: "
                "name a training set with the same classes"
            )
        pixels += count_classes(name).sum(axis=0)
    return pixels
