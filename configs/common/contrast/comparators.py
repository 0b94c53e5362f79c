"""Further methods to compare with, each on one map:

* `region`: region contrast (Hu et al., ICCV 2021), by its equations;
* `prototypes`: fixed prototypes as anchors (Ren et al., TCSVT 2024), of which we know the abstract;
* `clusters`: clustered prototypes (Zhou et al., CVPR 2022) beside the classifier;
* `centres`: the centre regulariser of CeCo (Zhong et al., CVPR 2023);
* `tree`: triplets along a class tree (Li et al., CVPR 2022), for datasets that have one.

A memory of rightly predicted pixels alone is `pixel_memory_correct` in pixel.py.

They tap the finest map of a feature pyramid; files of other decoders name another. The size of the
memory is for Cityscapes, and `max_anchors` is for the whole batch."""

from detectron2.config import LazyCall as L

from contrast_d2 import contrast

_map = dict(
    channels={"p2": "${model.sem_seg_head.fpn_channels}"},
    num_classes="${dataset.num_classes}",
    feature="p2",
    embed_dim=256,
)

region = L(contrast.region_contrast)(
    **_map,
    memory=L(contrast.MemoryBank)(
        num_classes="${dataset.num_classes}",
        embed_dim="${..embed_dim}",
        # As many as training images.
        regions_per_class=2975,
        pixels_per_class=0,
    ),
)

prototypes = L(contrast.fixed_prototypes)(**_map)

clusters = L(contrast.clustered_prototypes)(**_map)

centres = L(contrast.centre_regulariser)(**_map)

# Classes by group, such as `class_groups` of the dataset's metadata. A yaml config cannot name it.
tree = L(contrast.tree_triplets)(**_map, groups="???")
