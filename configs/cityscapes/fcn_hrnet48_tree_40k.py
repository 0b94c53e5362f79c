"""Cityscapes, HRNetV2-W48, triplets along a class tree: no number known. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_tree_40k.py --num-gpus 4

Triplets of Li et al., CVPR 2022, along the groups of the dataset's classes, without its loss on
scores of groups.
"""

from detectron2.data import MetadataCatalog as _MetadataCatalog

from ..common.contrast.comparators import tree as _tree
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_tree, "concat", _joined("concat"))
model.contrast.groups = _MetadataCatalog.get(dataset.train).class_groups
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_tree_40k"
