"""Your own images and label PNGs: a folder with a `dataset.json`, see docs/datasets.md.

`dataset.train=my_data_sem_seg_train dataset.test=my_data_sem_seg_val` takes the folder `my_data` of
`$DETECTRON2_DATASETS`; the classes come from its file."""

from contrast_d2.data import IGNORE_LABEL

from .base import dataloader, dataset

dataset.train = "folder_sem_seg_train"
dataset.test = "folder_sem_seg_val"
dataset.num_classes = "${num_classes:${dataset.train}}"
dataset.ignore_label = IGNORE_LABEL

# Smaller images are padded, larger ones cropped.
dataloader.train.mapper.augmentations.crop_size = (512, 512)
dataloader.train.total_batch_size = 8
