"""Dice and focal loss of segmentation-models-pytorch, an optional dependency.

Shape letters: B images, K classes, H W size of the labels.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

from .precision import full_precision


class LibraryLoss(nn.Module):
    """Another library's loss, safe where a batch has no valid pixel.

    Args:
        loss: (logits, labels) -> 0-dim tensor, which leaves out the pixels of `ignore_label`; what
            it gives if there are no others does not matter.
        ignore_label: pixels with this label do not count.
    """

    def __init__(self, loss: nn.Module, *, ignore_label: int = 255) -> None:
        super().__init__()
        self.loss = loss
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Args: logits (B, K, H, W), labels (B, H, W). Returns a 0-dim tensor."""
        any_valid = (labels != self.ignore_label).any()
        # The mean over no pixel is often nan, and stays so times 0: in such a batch all pixels are
        # taken for class 0 first.
        return _apply(logits, labels.where(any_valid, 0), self.loss) * any_valid


@full_precision
def _apply(logits: Tensor, labels: Tensor, loss: nn.Module) -> Tensor:
    return loss(logits, labels)


def dice_loss(*, log_loss: bool = False, ignore_label: int = 255) -> LibraryLoss:
    """1 - the soft Dice coefficient of each class over the batch, averaged over all K classes, of
    which those that the labels lack give 0.

    Args:
        log_loss: -log of the coefficient in place of 1 - it.
        ignore_label: pixels with this label do not count.

    Raises:
        ImportError: without the extra `losses`.

    Reference: Milletari et al., "V-Net: Fully Convolutional Neural Networks for Volumetric Medical
        Image Segmentation", 3DV 2016, for the coefficient of two classes, there with squares in
        the denominator.
    """
    loss = _library().DiceLoss(mode="multiclass", log_loss=log_loss, ignore_index=ignore_label)
    return LibraryLoss(loss, ignore_label=ignore_label)


def focal_loss(
    *, gamma: float = 2.0, alpha: float | None = None, ignore_label: int = 255
) -> LibraryLoss:
    """The focal loss of each class against all others, by sigmoids, averaged over pixels and
    classes.

    Args:
        gamma: exponent that takes weight off pixels that are right already; 0 or more.
        alpha: weight of a class's own pixels in [0, 1], 1 - alpha that of the others; None for
            equal weights of 1.
        ignore_label: pixels with this label do not count.

    Raises:
        ImportError: without the extra `losses`.

    Reference: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017.
    """
    loss = _library().FocalLoss(
        mode="multiclass", gamma=gamma, alpha=alpha, ignore_index=ignore_label
    )
    return LibraryLoss(loss, ignore_label=ignore_label)


def _library() -> ModuleType:
    try:
        from segmentation_models_pytorch import losses
    except ImportError as error:
        raise ImportError(
            "Dice and focal loss are those of segmentation-models-pytorch, which is not installed: "
            "pip install 'contrast_d2[losses]'"
        ) from error
    return losses
