"""ADE20K, 150 classes: 20,210 training and 2,000 validation images."""

from detectron2.data import MetadataCatalog

from .base import dataloader, dataset

dataset.train = "ade20k_sem_seg_train"
dataset.test = "ade20k_sem_seg_val"
dataset.num_classes = len(MetadataCatalog.get(dataset.train).stuff_classes)
dataset.ignore_label = MetadataCatalog.get(dataset.train).ignore_label

dataloader.train.mapper.augmentations.crop_size = (512, 512)
dataloader.train.total_batch_size = 16
