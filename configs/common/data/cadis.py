"""CaDIS, 960x540, task 2 of 17 classes: 3,550 training and 534 validation images.

Tasks 1 and 3, of 8 and 25 classes, are `dataset.train=cadis_task3_sem_seg_train
dataset.test=cadis_task3_sem_seg_val`, and alike; the 586 test images end in `_test`."""

from detectron2.config import LazyCall as L

from contrast_d2.data import IGNORE_LABEL, full_frame_augmentations

from .base import dataloader, dataset

dataset.train = "cadis_task2_sem_seg_train"
dataset.test = "cadis_task2_sem_seg_val"
dataset.num_classes = "${num_classes:${dataset.train}}"
dataset.ignore_label = IGNORE_LABEL

# Whole frames, mirrored at the edges to 544x960.
dataloader.train.mapper.augmentations = L(full_frame_augmentations)(multiple=32)
dataloader.train.total_batch_size = 8
