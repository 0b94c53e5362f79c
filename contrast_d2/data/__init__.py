"""Datasets, augmentation and loading. Importing this package registers the built-in datasets."""

from .augmentations import ColorJitter, RandomPad, RandomScale, train_augmentations
from .datasets import DATASETS, Classes, Dataset, load_folders, register_datasets
from .labels import IGNORE_LABEL, LabelMap, load_labels
from .loaders import build_test_loader, build_train_loader
from .mapper import SemSegMapper
from .samplers import ResumableTrainingSampler, sample_rng

register_datasets()

__all__ = [
    "DATASETS",
    "IGNORE_LABEL",
    "Classes",
    "ColorJitter",
    "Dataset",
    "LabelMap",
    "RandomPad",
    "RandomScale",
    "ResumableTrainingSampler",
    "SemSegMapper",
    "build_test_loader",
    "build_train_loader",
    "load_folders",
    "load_labels",
    "register_datasets",
    "sample_rng",
    "train_augmentations",
]
