"""The generated shapes dataset, 9 classes, 128x96: 256 training and 64 validation images."""

from detectron2.data import MetadataCatalog

from .base import dataloader, dataset

dataset.train = "shapes_sem_seg_train"
dataset.test = "shapes_sem_seg_val"
dataset.num_classes = len(MetadataCatalog.get(dataset.train).stuff_classes)
dataset.ignore_label = MetadataCatalog.get(dataset.train).ignore_label

dataloader.train.mapper.augmentations.crop_size = (96, 128)
dataloader.train.mapper.augmentations.scale = (0.75, 1.5)
dataloader.train.mapper.augmentations.max_class_area = 1.0  # most scenes are mostly background
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
dataloader.test.num_workers = 1
