"""CamVid, 11 classes, 480x360: 367 training, 101 validation and 233 test images."""

from detectron2.data import MetadataCatalog

from .base import dataloader, dataset

dataset.train = "camvid_sem_seg_train"
dataset.test = "camvid_sem_seg_val"
dataset.num_classes = len(MetadataCatalog.get(dataset.train).stuff_classes)
dataset.ignore_label = MetadataCatalog.get(dataset.train).ignore_label

dataloader.train.mapper.augmentations.crop_size = (360, 480)
