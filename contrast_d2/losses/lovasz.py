"""The Lovasz-softmax loss, a convex surrogate of the Jaccard index (intersection over union).

Of class c, with foreground probability f_i(c) at pixel i, the errors are

    m_i(c) = 1 - f_i(c) where c is the label, f_i(c) elsewhere,

and the loss is the Lovasz extension of the Jaccard loss at them: sum over pixels, from the largest
error down, of the error times what the pixel, put to those before it, adds to the Jaccard loss.

Shape letters: B images, K classes, H W size of the labels, G groups of pixels that are ranked
together (the batch, or each image), P pixels of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .precision import full_precision

Classes = Literal["present", "all"]


@full_precision
def lovasz_softmax(
    logits: Tensor,
    labels: Tensor,
    *,
    classes: Classes = "present",
    per_image: bool = False,
    ignore_label: int = 255,
) -> Tensor:
    """The mean over classes of the Lovasz extension of each class's Jaccard loss.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 classes or `ignore_label`.
        classes: "present" averages over the classes that the labels hold, "all" over all K; the
            loss of an absent class is the largest probability that it is given anywhere.
        per_image: take the loss of each image, and average over images with a valid pixel, instead
            of the loss of the whole batch.
        ignore_label: pixels with this label do not count.

    Returns:
        0-dim fp32 (or fp64) tensor in [0, 1], connected to the graph; 0 without a valid pixel.

    Reference: Berman et al., "The Lovasz-Softmax loss: A tractable surrogate for the optimization
        of the intersection-over-union measure in neural networks", CVPR 2018, section 3 and, for
        the weights, Algorithm 1.
    """
    num_classes = logits.shape[1]
    probabilities = logits.softmax(dim=1).flatten(2)  # (B, K, H*W)
    labels = labels.flatten(1)
    if not per_image:
        probabilities = probabilities.transpose(0, 1).flatten(1)[None]
        labels = labels.flatten()[None]
    valid_GP = labels != ignore_label
    classes_K = torch.arange(num_classes, device=labels.device)
    foreground_GKP = (labels[:, None] == classes_K[:, None]) & valid_GP[:, None]
    errors_GKP = torch.where(foreground_GKP, 1 - probabilities, probabilities)
    weights_GKP = _jaccard_steps(errors_GKP.detach(), foreground_GKP, valid_GP)
    losses_GK = (errors_GKP * weights_GKP).sum(dim=2)

    counted_GK = valid_GP.any(dim=1, keepdim=True).expand_as(losses_GK)
    if classes == "present":
        counted_GK = foreground_GKP.any(dim=2)
    losses_G = (losses_GK * counted_GK).sum(dim=1) / counted_GK.sum(dim=1).clamp(min=1)
    return losses_G.sum() / valid_GP.any(dim=1).sum().clamp(min=1)


def _jaccard_steps(errors_GKP: Tensor, foreground_GKP: Tensor, valid_GP: Tensor) -> Tensor:
    """What each pixel adds to the Jaccard loss of the pixels with larger errors: (G, K, P).

    These are the differences of Algorithm 1 in closed form. Subtracting neighbouring values of the
    Jaccard loss would leave few digits of them, for a step is of the order of 1 / P.
    """
    # Ignored pixels go to the end: there the intersection is empty, and the step 0.
    order = errors_GKP.masked_fill(~valid_GP[:, None], -1).argsort(dim=2, descending=True)
    foreground = foreground_GKP.gather(2, order)
    found = foreground.cumsum(dim=2, dtype=torch.int32)
    size = foreground.sum(dim=2, keepdim=True, dtype=torch.int32)
    ranks = torch.arange(1, foreground.shape[2] + 1, device=order.device, dtype=torch.int32)
    # A foreground pixel takes one off the intersection; another adds one to the union instead.
    intersection = (size - found).to(errors_GKP.dtype)
    union = (size + ranks - found).to(errors_GKP.dtype)
    steps = torch.where(foreground, 1 / union, intersection / (union * (union - 1).clamp(min=1)))
    # Of an absent class the first wrong pixel loses everything, and no other anything.
    steps = torch.where(size == 0, (ranks == 1).to(steps.dtype), steps)
    return torch.empty_like(steps).scatter_(2, order, steps)


class LovaszSoftmaxLoss(nn.Module):
    """`lovasz_softmax` with its settings.

    Args:
        classes: "present" or "all": over which classes the mean runs.
        per_image: rank the pixels of each image by themselves, not those of the whole batch.
        ignore_label: pixels with this label do not count.

    Raises:
        ValueError: an unknown choice of classes.
    """

    def __init__(
        self, *, classes: Classes = "present", per_image: bool = False, ignore_label: int = 255
    ) -> None:
        super().__init__()
        if classes not in ("present", "all"):
            raise ValueError(f"classes={classes!r}: choose 'present' or 'all'.")
        self.classes: Classes = classes
        self.per_image = per_image
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Args: logits (B, K, H, W), labels (B, H, W). Returns a 0-dim tensor."""
        return lovasz_softmax(
            logits,
            labels,
            classes=self.classes,
            per_image=self.per_image,
            ignore_label=self.ignore_label,
        )
