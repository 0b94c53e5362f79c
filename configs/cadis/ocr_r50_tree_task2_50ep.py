"""CaDIS, task 2, OCR on ResNet-50, triplets along a class tree on C5: no number known. Four GPUs;
the paper does not state how many.

python train_net.py --config-file configs/cadis/ocr_r50_tree_task2_50ep.py --num-gpus 4

Triplets of Li et al., CVPR 2022, along the groups of the dataset's classes, without its loss on
scores of groups.
"""

from detectron2.data import MetadataCatalog as _MetadataCatalog

from ..common.contrast.comparators import tree as _tree
from ..common.contrast.taps import stages as _stages
from ..common.contrast.taps import tap as _tap
from .ocr_r50_base_task2_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_tree, "res5", _stages)
model.contrast.groups = _MetadataCatalog.get(dataset.train).class_groups
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cadis/ocr_r50_tree_task2_50ep"
