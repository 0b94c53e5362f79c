"""PASCAL-Context, 59 classes: 4,998 training and 5,105 validation images.

Its 60 classes, with the background, are `dataset.train=pascal_context_60_sem_seg_train
dataset.test=pascal_context_60_sem_seg_val`."""

from contrast_d2.data import IGNORE_LABEL

from .base import dataloader, dataset

dataset.train = "pascal_context_59_sem_seg_train"
dataset.test = "pascal_context_59_sem_seg_val"
dataset.num_classes = "${num_classes:${dataset.train}}"
dataset.ignore_label = IGNORE_LABEL

dataloader.train.mapper.augmentations.crop_size = (512, 512)
dataloader.train.total_batch_size = 16
