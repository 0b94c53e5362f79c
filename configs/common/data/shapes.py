"""The generated shapes dataset: small scenes with a long-tailed class distribution."""

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

_metadata = MetadataCatalog.get("shapes_sem_seg_train")

dataset = dict(
    train="shapes_sem_seg_train",
    test="shapes_sem_seg_val",
    num_classes=len(_metadata.stuff_classes),
    ignore_label=_metadata.ignore_label,
)

dataloader = dict(
    train=L(build_train_loader)(
        dataset="${dataset.train}",
        mapper=L(SemSegMapper)(
            dataset_name="${dataset.train}",
            augmentations=L(train_augmentations)(
                crop_size=(96, 128), scale=(0.75, 1.5), max_class_area=1.0
            ),
            is_train=True,
        ),
        total_batch_size=8,
        num_workers=1,
        seed="${train.seed}",
        accumulation_steps="${train.accumulation_steps}",
    ),
    test=L(build_test_loader)(
        dataset="${dataset.test}",
        mapper=L(SemSegMapper)(dataset_name="${dataset.test}", is_train=False),
        num_workers=1,
    ),
    evaluator=L(SemSegEvaluator)(
        dataset_name="${dataset.test}",
        output_dir="${train.output_dir}/inference/${dataset.test}",
    ),
)
