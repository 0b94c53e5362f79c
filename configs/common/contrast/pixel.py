"""Pixel contrast (Wang et al., ICCV 2021) with the anchors of the paper: within the batch
(`pixel`), with a memory bank (`pixel_memory`), with semi-hard pairs as well
(`pixel_memory_semi_hard`), and that with the paper's weight (`pixel_memory_paper`); with a memory
of rightly predicted pixels alone, which is not the paper's (`pixel_memory_correct`); and with the
anchors of its official code: `pixel_release` and `pixel_memory_release`.

They tap the finest map of a feature pyramid, which like the paper's joins all stages at stride 4;
files of other decoders name another. `max_anchors` is for the whole batch; the official code's
1,024 is for the images of one GPU. The sizes of a memory are for Cityscapes; files of other
datasets set theirs."""

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
# As many regions as training images, and ten times as many pixels.
pixel_memory.memory = L(contrast.MemoryBank)(
    num_classes="${dataset.num_classes}",
    embed_dim="${..embed_dim}",
    regions_per_class=2975,
    pixels_per_class=29_750,
    # The paper sets no bound. All keys of 19 classes would be 621,775.
    # These are 2,000 of each.
    max_keys=38_000,
)

pixel_memory_correct = deepcopy(pixel_memory)
pixel_memory_correct.memory.admission = "correct"

# Early in training this choice can draw all embeddings to one point; see docs/methods.md.
pixel_memory_semi_hard = deepcopy(pixel_memory)
pixel_memory_semi_hard.pairs = L(contrast.SemiHardPairs)(
    fraction=0.1, max_positives=1024, max_negatives=2048
)

pixel_memory_paper = deepcopy(pixel_memory_semi_hard)
pixel_memory_paper.weight = 1.0

pixel_release = L(contrast.pixel_contrast_release)(
    channels={"p2": "${model.sem_seg_head.fpn_channels}"},
    num_classes="${dataset.num_classes}",
    feature="p2",
    embed_dim=256,
    warmup_iters=5000,
)

pixel_memory_release = deepcopy(pixel_release)
pixel_memory_release.weight = 1.0
pixel_memory_release.temperature = 0.07
pixel_memory_release.max_per_group = 1
pixel_memory_release.memory = L(contrast.MemoryBank)(
    num_classes="${dataset.num_classes}",
    embed_dim="${..embed_dim}",
    regions_per_class=5000,
    pixels_per_class=5000,
    max_keys=None,
)
