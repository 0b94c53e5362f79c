"""Evaluation of semantic segmentation."""

from .evaluator import SemSegEvaluator
from .inference import InferenceProtocol, MultiScaleFlip, SlidingWindow
from .metrics import AbsentClasses, SegmentationScores, confusion_matrix, segmentation_scores
from .prior import PositionPrior, evaluate_position_prior, most_frequent_labels

__all__ = [
    "AbsentClasses",
    "InferenceProtocol",
    "MultiScaleFlip",
    "PositionPrior",
    "SegmentationScores",
    "SemSegEvaluator",
    "SlidingWindow",
    "confusion_matrix",
    "evaluate_position_prior",
    "most_frequent_labels",
    "segmentation_scores",
]
