"""Region mutual information: how much a prediction tells of the labels of whole patches.

Around every position, a patch of R x R labels and one of R x R probabilities are taken as vectors
of d = R^2 dimensions, y and p. For each image and class, over all positions, with the covariances
S_y, S_p and C = Cov(y, p), a lower bound of the mutual information of y and p is, but for a
constant,

    I = -1/2 log det( S_y - C S_p^-1 C^T ).

Shape letters: B images, K classes, H W size of the labels, h w pooled, N positions, d = R^2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .precision import full_precision

Pool = Literal["average", "max"]

# Added to the diagonal of covariances, which are singular for a class that an image lacks.
_RIDGE = 5e-4


def region_mutual_information(
    targets: Tensor,
    probabilities: Tensor,
    *,
    radius: int = 3,
    stride: int = 4,
    pool: Pool = "average",
) -> Tensor:
    """The lower bound of the mutual information of patches, for each image and class.

    It is computed in fp64, as in the paper: the determinant of a covariance that a good prediction
    explains almost wholly is a small difference of large numbers.

    Args:
        targets: (B, K, H, W), 1 at pixels of the class and 0 elsewhere; constant.
        probabilities: (B, K, H, W) in [0, 1]. Where a pixel is to be ignored, 0 in both.
        radius: side R of a patch, in pooled pixels.
        stride: both are first pooled over squares of this side.
        pool: how; by the maximum a square is of every class that it touches.

    Returns:
        (B, K) fp64, I / d: larger is better. Of a class that an image lacks it is a constant. The
        covariances are sums over the positions; means would add a constant, and give the ridge of
        5e-4 on the diagonals another weight.

    Raises:
        ValueError: the maps are smaller than one patch.

    Reference: Zhao et al., "Region Mutual Information Loss for Semantic Segmentation", NeurIPS
        2019, section 3.
    """
    height, width = targets.shape[-2:]
    if min(height, width) < radius * stride:
        raise ValueError(
            f"patches of {radius}x{radius} at stride {stride} need maps of {radius * stride} "
            f"pixels a side, these have {height}x{width}: take larger crops or a smaller stride."
        )
    y_BKdN = _patches(targets, radius, stride, pool)
    p_BKdN = _patches(probabilities, radius, stride, pool)
    identity_dd = torch.eye(radius**2, dtype=y_BKdN.dtype, device=y_BKdN.device)
    covariance_y = y_BKdN @ y_BKdN.mT
    covariance_p = p_BKdN @ p_BKdN.mT
    cross = p_BKdN @ y_BKdN.mT  # C^T
    # Without the check of cholesky(), which waits for the device: with the ridge both matrices are
    # positive definite. With S_p = L L^T, C S_p^-1 C^T is A^T A of A = L^-1 C^T.
    root_p = torch.linalg.cholesky_ex(covariance_p + _RIDGE * identity_dd).L
    explained = torch.linalg.solve_triangular(root_p, cross, upper=False)
    remainder = covariance_y - explained.mT @ explained
    root = torch.linalg.cholesky_ex(remainder + _RIDGE * identity_dd).L
    half_log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    return -half_log_det / radius**2


def _patches(maps: Tensor, radius: int, stride: int, pool: Pool) -> Tensor:
    """Centred vectors of all patches of the pooled maps, (B, K, d, N) fp64."""
    pooling = F.max_pool2d if pool == "max" else F.avg_pool2d
    pooled = pooling(maps, stride).double()  # h = H // stride
    vectors = F.unfold(pooled.flatten(0, 1)[:, None], radius)
    vectors = vectors - vectors.mean(dim=-1, keepdim=True)
    return vectors.unflatten(0, maps.shape[:2])


@full_precision
def rmi_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: float = 0.5,
    radius: int = 3,
    stride: int = 4,
    pool: Pool = "average",
    ignore_label: int = 255,
) -> Tensor:
    """Binary cross entropy of every class, and the region mutual information:

        L = weight * BCE + (1 - weight) * mean over images of the sum over classes of -I / d

    Scores become probabilities by a sigmoid for each class, as in the paper; the prediction is
    still the class of the largest score. The cross entropy is summed over the classes and averaged
    over the valid pixels.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 classes or `ignore_label`.
        weight: of the cross entropy, in [0, 1]; the paper's lambda.
        radius: side R of a patch, in pooled pixels.
        stride, pool: as in `region_mutual_information`.
        ignore_label: pixels with this label do not count; an image without another is left out.

    Returns:
        0-dim fp32 (or fp64) tensor, connected to the graph; 0 without a valid pixel. It can be
        negative.

    Raises:
        ValueError: the maps are smaller than one patch.

    Reference: Zhao et al., "Region Mutual Information Loss for Semantic Segmentation", NeurIPS
        2019, section 3.
    """
    valid = labels != ignore_label  # (B, H, W)
    classes_K11 = torch.arange(logits.shape[1], device=labels.device)[:, None, None]
    targets = ((labels[:, None] == classes_K11) & valid[:, None]).to(logits.dtype)
    mask = valid[:, None].to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, targets, weight=mask, reduction="sum")
    cross_entropy = total / valid.sum().clamp(min=1)

    information_BK = region_mutual_information(
        targets, logits.sigmoid() * mask, radius=radius, stride=stride, pool=pool
    )
    counted_B = valid.flatten(1).any(dim=1)
    information = (information_BK.sum(dim=1) * counted_B).sum() / counted_B.sum().clamp(min=1)
    return weight * cross_entropy - (1 - weight) * information.to(logits.dtype)


class RMILoss(nn.Module):
    """`rmi_loss` with its settings.

    Args:
        weight: of the cross entropy, in [0, 1]; the paper's lambda.
        radius: side of a patch, in pooled pixels; 3 makes vectors of 9 dimensions.
        stride: labels and probabilities are first pooled over squares of this side.
        pool: "average" as in the paper, or "max", which the code of Wang et al., ICCV 2021, has at
            stride 3.
        ignore_label: pixels with this label do not count.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        *,
        weight: float = 0.5,
        radius: int = 3,
        stride: int = 4,
        pool: Pool = "average",
        ignore_label: int = 255,
    ) -> None:
        super().__init__()
        if pool not in ("average", "max"):
            raise ValueError(f"pool={pool!r}: choose 'average' or 'max'.")
        if not 0 <= weight <= 1:
            raise ValueError(f"weight={weight}: must lie in [0, 1].")
        if radius < 1 or stride < 1:
            raise ValueError(f"radius={radius}, stride={stride}: both must be at least 1.")
        self.weight = weight
        self.radius = radius
        self.stride = stride
        self.pool: Pool = pool
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Args: logits (B, K, H, W), labels (B, H, W). Returns a 0-dim tensor."""
        return rmi_loss(
            logits,
            labels,
            weight=self.weight,
            radius=self.radius,
            stride=self.stride,
            pool=self.pool,
            ignore_label=self.ignore_label,
        )
