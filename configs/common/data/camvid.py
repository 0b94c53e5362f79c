"""CamVid, 11 classes, 480x360: 367 training, 101 validation and 233 test images."""

from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog

import contrast_d2.data
from contrast_d2.data import (
    SemSegMapper,
    build_test_loader,
    build_train_loader,
    train_augmentations,
)
from contrast_d2.evaluation import SemSegEvaluator

_metadata = MetadataCatalog.get("camvid_sem_seg_train")

dataset = dict(
    train="camvid_sem_seg_train",
    test="camvid_sem_seg_val",
    num_classes=len(_metadata.stuff_classes),
    ignore_label=_metadata.ignore_label,
)

dataloader = dict(
    train=L(build_train_loader)(
        dataset="${dataset.train}",
        mapper=L(SemSegMapper)(
            dataset_name="${dataset.train}",
            augmentations=L(train_augmentations)(
                crop_size=(360, 480), scale=(0.5, 2.0), aspect=(0.9, 1.1), max_class_area=0.75
            ),
            is_train=True,
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
        accumulation_steps="${train.accumulation_steps}",
    ),
    test=L(build_test_loader)(
        dataset="${dataset.test}",
        mapper=L(SemSegMapper)(dataset_name="${dataset.test}", is_train=False),
        num_workers=2,
    ),
    evaluator=L(SemSegEvaluator)(
        dataset_name="${dataset.test}",
        output_dir="${train.output_dir}/inference/${dataset.test}",
    ),
)
