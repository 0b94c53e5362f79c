"""CamVid, Semantic FPN on ResNet-18, two methods on shared projectors: multi- and cross-scale
contrast, and Contextrast. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_contextrast_6k.py
"""

from detectron2.config import LazyCall as _L

from contrast_d2.contrast import ContrastSum as _ContrastSum

from ..common.contrast.contextrast import contextrast as _contextrast
from ..common.contrast.ms_cs import ms_cs as _ms_cs
from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

# Heads of one map are shared, and so have to be alike.
_contextrast.num_hidden = 2
model.contrast = _L(_ContrastSum)(
    # By name, since a plain dict would not be built.
    methods=_L("builtins.dict")(ms_cs=_ms_cs, contextrast=_contextrast),
    weights=dict(ms_cs=0.5, contextrast=0.5),
)
train.output_dir = "output/camvid/semfpn_r18_ms_cs_contextrast_6k"
