"""Test protocols, for `dataloader.inference` of experiment files; all but the first are costlier.

An experiment file takes one as

    from ..common.inference import pascal_context_multi_scale as _inference
    dataloader.inference = _inference

Where a release sums up logits, or their exponentials, over views, these average probabilities. A
scale of 1 is in the list where it is a view, once, which releases append to their lists. The model
itself pads to the multiples that it needs, with its mean, and no padded pixel is scored.
"""

from detectron2.config import LazyCall as L

from contrast_d2.evaluation import InferenceProtocol

# Whole images of their own size, one view: Cityscapes at 1024x2048, CamVid, CaDIS, and ADE20K for
# HRNet, OCRNet and DeepLabV3. CaDIS' release reflects two rows at the top and bottom of each frame
# and scores them too.
whole_image = L(InferenceProtocol)(pad_value="${model.pixel_mean}")

# Pissas et al., ECCV 2022. The paper does not state sizes and scales: they are its release's. That
# runs scales from 1 on in windows of 512x1024 without overlap; ours are whole images.
cityscapes_multi_scale = L(InferenceProtocol)(
    scales=[0.75, 1.0, 1.25, 1.5, 1.75, 2.0],
    flip=True,
    pad_value="${model.pixel_mean}",
)
ade20k_multi_scale = L(InferenceProtocol)(
    scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
    flip=True,
    pad_value="${model.pixel_mean}",
)
# Transformers on ADE20K. The release's windows swap height and width in the multi-scale test and
# change the aspect ratio; ours are whole images of their own aspect ratio.
ade20k_short_side = L(InferenceProtocol)(short_side=512, pad_value="${model.pixel_mean}")
ade20k_short_side_multi_scale = L(InferenceProtocol)(
    short_side=512,
    scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
    flip=True,
    pad_value="${model.pixel_mean}",
)
# One view has a short side of 512, which the release has in a comment and in a config that it does
# not ship; several have a long side of 520 times the scale.
pascal_context = L(InferenceProtocol)(short_side=512, pad_value="${model.pixel_mean}")
pascal_context_multi_scale = L(InferenceProtocol)(
    long_side=520,
    scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0],  # of HRNet's recipe
    flip=True,
    window=512,
    stride=341,  # two thirds of the window
    pad_value="${model.pixel_mean}",
)

# Wang et al., ICCV 2021, as in its release, for all datasets: whole images.
pixel_contrast_multi_scale = L(InferenceProtocol)(
    scales=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0],
    flip=True,
    pad_value="${model.pixel_mean}",
)

# Sung et al., for all datasets: scales and flip of "Contextrast++", arXiv 2608.22679, section IV-A.
# Whether in windows, it does not state; ours are whole images.
contextrast_multi_scale = L(InferenceProtocol)(
    scales=[0.75, 1.0, 1.25, 1.5, 1.75, 2.0],
    flip=True,
    pad_value="${model.pixel_mean}",
)
