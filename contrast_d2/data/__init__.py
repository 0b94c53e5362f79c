"""Datasets, augmentation and loading. Importing this package registers the built-in datasets."""

from .augmentations import (
    RandomGaussianBlur,
    ReflectPad,
    full_frame_augmentations,
    train_augmentations,
)
from .classes import Classes
from .colors import ColorJitter
from .datasets import DATASETS, Dataset, num_classes, register_datasets, register_folder
from .files import load_folders
from .labels import IGNORE_LABEL, LabelMap, load_labels
from .loaders import build_test_loader, build_train_loader
from .mapper import SemSegMapper
from .samplers import ResumableTrainingSampler, sample_rng
from .scaling import RandomPad, RandomScale, RandomScaledCrop

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
    "RandomScaledCrop",
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
