"""detectron2's yaml configs: what may stand in them, and the LazyConfig tree that they stand for.

    cfg = get_cfg()
    add_contrast_config(cfg)
    cfg.merge_from_file("configs/camvid/semfpn_r18_ms_cs_6k.yaml")
    model = build_model(cfg)        # detectron2's
    tree = tree_from_yacs(cfg)      # or the whole experiment, as a LazyConfig file defines it

Keys that detectron2 has mean what they mean there. Every other setting is an argument of a class or
function, under its name in upper case, in the section of that class (`signatures`):

    MODEL.TIMM                  TimmBackbone, if it is MODEL.BACKBONE.NAME
    MODEL.SEM_SEG_HEAD.FCN      FCNDecoder, if it is MODEL.SEM_SEG_HEAD.NAME, and so on
    MODEL.CONTRAST.MULTISCALE   MultiScaleContrast, if it is MODEL.CONTRAST.NAME, and so on
    MODEL.SEG_LOSS              SegLoss; MODEL.SEG_LOSS.CROSSENTROPY CrossEntropyLoss, and so on
    INPUT.AUGMENTATIONS         train_augmentations
    TEST.INFERENCE              InferenceProtocol

A section's name is that of the class without its last word for the kind: Backbone, Decoder,
Contrast, Loss. A key that is not at its default and that nothing reads is an error.
"""

from .experiment import tree_from_yacs
from .keys import CONFIG_REGISTRY, CONTRAST_REGISTRY, SEG_LOSS_REGISTRY, add_contrast_config
from .model import build_registered_backbone, build_registered_head

__all__ = [
    "CONFIG_REGISTRY",
    "CONTRAST_REGISTRY",
    "SEG_LOSS_REGISTRY",
    "add_contrast_config",
    "build_registered_backbone",
    "build_registered_head",
    "tree_from_yacs",
]
