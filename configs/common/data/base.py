"""Loaders and evaluator; the files beside this one say of which dataset, and how it is cropped."""

from detectron2.config import LazyCall as L

from contrast_d2.data import (
    SemSegMapper,
    build_test_loader,
    build_train_loader,
    train_augmentations,
)
from contrast_d2.evaluation import SemSegEvaluator

from ..inference import whole_image

dataset = dict(train="???", test="???", num_classes="???", ignore_label="???")

dataloader = dict(
    train=L(build_train_loader)(
        dataset="${dataset.train}",
        mapper=L(SemSegMapper)(
            dataset_name="${dataset.train}",
            augmentations=L(train_augmentations)(
                crop_size="???",
                scale=(0.5, 2.0),
                aspect=(0.9, 1.1),
                max_class_area=0.75,
                ignore_label="${dataset.ignore_label}",
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
    inference=whole_image,
    evaluator=L(SemSegEvaluator)(
        dataset_name="${dataset.test}",
        output_dir="${train.output_dir}/inference/${dataset.test}",
    ),
)
