"""Cityscapes, 19 classes, 2048x1024: 2,975 training and 500 validation images.

The label files are `*_labelTrainIds.png`: `python tools/prepare_dataset.py cityscapes` writes
them."""

from detectron2.data import MetadataCatalog

from .base import dataloader, dataset

dataset.train = "cityscapes_fine_sem_seg_train"
dataset.test = "cityscapes_fine_sem_seg_val"
dataset.num_classes = len(MetadataCatalog.get(dataset.train).stuff_classes)
dataset.ignore_label = MetadataCatalog.get(dataset.train).ignore_label

dataloader.train.mapper.augmentations.crop_size = (512, 1024)
dataloader.train.total_batch_size = 8
