"""Evaluation of semantic segmentation."""

from .boundaries import BoundaryIoU, TrimapIoU
from .cityscapes import CityscapesScores
from .evaluator import SemSegEvaluator
from .inference import InferenceProtocol, MultiScaleFlip, SlidingWindow
from .measure import Measure
from .metrics import AbsentClasses, SegmentationScores, confusion_matrix, segmentation_scores
from .prior import PositionPrior, evaluate_position_prior, most_frequent_labels
from .submission import SubmissionWriter

__all__ = [
    "AbsentClasses",
    "BoundaryIoU",
    "CityscapesScores",
    "InferenceProtocol",
    "Measure",
    "MultiScaleFlip",
    "PositionPrior",
    "SegmentationScores",
    "SemSegEvaluator",
    "SlidingWindow",
    "SubmissionWriter",
    "TrimapIoU",
    "confusion_matrix",
    "evaluate_position_prior",
    "most_frequent_labels",
    "segmentation_scores",
]
