"""Pixel contrast with the anchors of the ICCV 2021 paper, within the batch (`pixel`), with a memory
bank (`pixel_memory`), and with the paper's semi-hard pairs as well (`pixel_memory_semi_hard`); and
as its release does it, without memory (`pixel_release`).

They tap the finest map of a feature pyramid, which like the paper's joins all stages at stride 4;
files of other decoders name another. `max_anchors` is for the whole batch; the release's 1,024 is
for the images of one GPU."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2.contrast import (
    HardAnchorSampler,
    MemoryBank,
    MultiScaleProjector,
    PixelContrast,
    SemiHardPairs,
)

pixel = L(PixelContrast)(
    projector=L(MultiScaleProjector)(
        in_channels={"p2": "${model.sem_seg_head.fpn_channels}"},
        embed_dim=256,
        num_hidden=1,
        norm="batch",
        order="norm_relu",
    ),
    sampler=L(HardAnchorSampler)(
        num_classes="${dataset.num_classes}",
        balance="class",
        max_per_group=50,
        hard_share=0.5,
        rest="random",
        across_processes="${..across_processes}",
    ),
    feature="p2",
    # The release's. In its settings 5000 of 40k iterations pass without contrast.
    weight=0.1,
    warmup_iters=5000,
    temperature=0.1,
    across_processes=False,
)

pixel_memory = deepcopy(pixel)
# The sizes are the release's; the paper has as many regions as there are training images, and ten
# times as many pixels.
pixel_memory.memory = L(MemoryBank)(
    num_classes="${dataset.num_classes}",
    embed_dim="${..projector.embed_dim}",
    regions_per_class=5000,
    pixels_per_class=5000,
    pixels_per_image=10,
    dtype="fp32",
    persistent=True,
)
# The paper sets no bound. All keys of 19 classes would be 190,000.
pixel_memory.memory_per_class = 2000

# Early in training this choice can draw all embeddings to one point; see docs/methods.md.
pixel_memory_semi_hard = deepcopy(pixel_memory)
pixel_memory_semi_hard.pairs = L(SemiHardPairs)(
    fraction=0.1, max_positives=1024, max_negatives=2048
)

pixel_release = deepcopy(pixel)
pixel_release.sampler.balance = "image_class"
pixel_release.sampler.max_anchors = 1024
pixel_release.sampler.max_per_group = 100
pixel_release.sampler.min_pixels = 101
pixel_release.sampler.rest = "easy"
pixel_release.base_temperature = 0.07
