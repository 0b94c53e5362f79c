"""CamVid as first released, 960x720, 32 labels reduced to 11 classes: 367 training, 101 validation
and 233 test images, split as the 480x360 release."""

from detectron2.data import MetadataCatalog

from .base import dataloader, dataset

dataset.train = "camvid_original_sem_seg_train"
dataset.test = "camvid_original_sem_seg_val"
dataset.num_classes = len(MetadataCatalog.get(dataset.train).stuff_classes)
dataset.ignore_label = MetadataCatalog.get(dataset.train).ignore_label

dataloader.train.mapper.augmentations.crop_size = (720, 960)
