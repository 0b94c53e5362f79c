"""COCO-Stuff 10k, 171 classes: 9,000 training and 1,000 test images.

The 164k release has the same classes: `dataset.train=coco_stuff_164k_sem_seg_train
dataset.test=coco_stuff_164k_sem_seg_val`."""

from contrast_d2.data import IGNORE_LABEL

from .base import dataloader, dataset

dataset.train = "coco_stuff_10k_sem_seg_train"
dataset.test = "coco_stuff_10k_sem_seg_test"
dataset.num_classes = "${num_classes:${dataset.train}}"
dataset.ignore_label = IGNORE_LABEL

dataloader.train.mapper.augmentations.short_side = 520
dataloader.train.mapper.augmentations.crop_size = (520, 520)
dataloader.train.total_batch_size = 16
