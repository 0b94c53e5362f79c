"""Datasets, augmentation and loading. Importing this package registers the built-in datasets."""

from .augmentations import (
    ColorJitter,
    RandomGaussianBlur,
    RandomPad,
    RandomScale,
    ReflectPad,
    full_frame_augmentations,
    train_augmentations,
)
from .classes import Classes
from .datasets import DATASETS, Dataset, num_classes, register_datasets, register_folder
from .files import load_folders
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
    "RandomGaussianBlur",
    "RandomPad",
    "RandomScale",
    "ReflectPad",
    "ResumableTrainingSampler",
    "SemSegMapper",
    "build_test_loader",
    "build_train_loader",
    "full_frame_augmentations",
    "load_folders",
    "load_labels",
    "num_classes",
    "register_datasets",
    "register_folder",
    "sample_rng",
    "train_augmentations",
]
