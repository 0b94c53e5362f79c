"""Checks of a dataset before it is trained on; the command is ``tools/check_dataset.py``."""

from .findings import Finding, Severity
from .report import text_report
from .run import CheckedDataset, check_dataset

__all__ = [
    "CheckedDataset",
    "Finding",
    "Severity",
    "check_dataset",
    "text_report",
]
