"""Pixel contrast with the anchors of the ICCV 2021 paper, within the batch (`pixel`), with a memory
bank (`pixel_memory`), and with the paper's semi-hard pairs as well (`pixel_memory_semi_hard`); and
as its official code does it, without memory (`pixel_release`).

They tap the finest map of a feature pyramid, which like the paper's joins all stages at stride 4;
files of other decoders name another. `max_anchors` is for the whole batch; the official code's
1,024 is for the images of one GPU."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2 import contrast

pixel = L(contrast.pixel_contrast)(
    channels={"p2": "${model.sem_seg_head.fpn_channels}"},
    num_classes="${dataset.num_classes}",
    feature="p2",
    embed_dim=256,
    # Of the official code's 40k iterations.
    warmup_iters=5000,
)

pixel_memory = deepcopy(pixel)
# The sizes are the official code's; the paper has as many regions as there are training images, and
# ten times as many pixels.
pixel_memory.memory = L(contrast.MemoryBank)(
    num_classes="${dataset.num_classes}",
    embed_dim="${..embed_dim}",
    regions_per_class=5000,
    pixels_per_class=5000,
    # The paper sets no bound. All keys of 19 classes would be 190,000.
    max_per_class=2000,
)

# Early in training this choice can draw all embeddings to one point; see docs/methods.md.
pixel_memory_semi_hard = deepcopy(pixel_memory)
pixel_memory_semi_hard.pairs = L(contrast.SemiHardPairs)(
    fraction=0.1, max_positives=1024, max_negatives=2048
)

pixel_release = L(contrast.pixel_contrast_release)(
    channels={"p2": "${model.sem_seg_head.fpn_channels}"},
    num_classes="${dataset.num_classes}",
    feature="p2",
    warmup_iters=5000,
)
