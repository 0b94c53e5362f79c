"""ADE20K, 150 classes: 20,210 training and 2,000 validation images."""

from contrast_d2.data import IGNORE_LABEL

from .base import dataloader, dataset

dataset.train = "ade20k_sem_seg_train"
dataset.test = "ade20k_sem_seg_val"
dataset.num_classes = "${num_classes:${dataset.train}}"
dataset.ignore_label = IGNORE_LABEL

dataloader.train.mapper.augmentations.crop_size = (512, 512)
dataloader.train.total_batch_size = 16
