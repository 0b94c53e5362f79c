"""Cityscapes, HRNetV2-W48, clustered prototypes: no number known. Four GPUs.

python train_net.py --config-file configs/cityscapes/fcn_hrnet48_clusters_40k.py --num-gpus 4

Clustered prototypes of Zhou et al., CVPR 2022, beside the classifier, which they replace there: no
number is known of that.
"""

from ..common.contrast.comparators import clusters as _clusters
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_clusters, "concat", _joined("concat"))
model.contrast.max_anchors = 40_000  # 10,000 on each of four GPUs
train.output_dir = "output/cityscapes/fcn_hrnet48_clusters_40k"
