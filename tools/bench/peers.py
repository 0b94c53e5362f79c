"""What the library is compared with: the textbook form of its loss, and pytorch-metric-learning.

Shape letters: A anchors, C contrast samples, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def textbook_info_nce(
    anchors: Tensor,
    labels: Tensor,
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    count_empty_anchors: bool = False,
) -> Tensor:
    """The supervised InfoNCE as one writes it down: whole matrices, masks, and autograd.

    The same value as `contrast_d2.contrast.info_nce`, in A x C memory.

    Args:
        anchors: (A, D) unit vectors.
        labels: (A,) classes.
        contrast: (C, D) unit vectors; None contrasts the anchors among themselves.
        contrast_labels: (C,) classes.
        temperature: divides the similarities.
        count_empty_anchors: average over all anchors, not only over those with a positive.
    """
    if contrast is None or contrast_labels is None:
        logits_AC = anchors @ anchors.T / temperature
        same_AC = labels[:, None] == labels
        others_AC = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        positive_AC = (same_AC & others_AC).to(logits_AC.dtype)
    else:
        logits_AC = anchors @ contrast.T / temperature
        same_AC = labels[:, None] == contrast_labels
        positive_AC = same_AC.to(logits_AC.dtype)
    negative_AC = (~same_AC).to(logits_AC.dtype)
    logits_AC = logits_AC - logits_AC.detach().amax(dim=1, keepdim=True)
    exp_AC = logits_AC.exp()
    negatives_A = (exp_AC * negative_AC).sum(dim=1, keepdim=True)
    log_prob_AC = logits_AC - (exp_AC + negatives_A).log()
    num_positives = positive_AC.sum(dim=1)
    losses_A = -(log_prob_AC * positive_AC).sum(dim=1) / num_positives.clamp(min=1)
    num_averaged = len(labels) if count_empty_anchors else (num_positives > 0).sum()
    return losses_A.sum() / torch.as_tensor(num_averaged).clamp(min=1)


class SupConPeer:
    """pytorch-metric-learning's SupConLoss, called like `textbook_info_nce`.

    Another loss for the same purpose: all positives stand in each denominator.

    Args:
        temperature: divides the similarities.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        self._loss = _import_peer().SupConLoss(temperature=temperature)

    def __call__(
        self,
        anchors: Tensor,
        labels: Tensor,
        contrast: Tensor | None = None,
        contrast_labels: Tensor | None = None,
    ) -> Tensor:
        return self._loss(anchors, labels, ref_emb=contrast, ref_labels=contrast_labels)


class CrossBatchMemoryPeer:
    """pytorch-metric-learning's CrossBatchMemory around its SupConLoss, with a full memory.

    Args:
        memory: (C, D) unit vectors.
        labels: (C,) classes.
        batch: how many anchors each call brings, which take the place of the oldest samples.
        temperature: divides the similarities.
    """

    def __init__(self, memory: Tensor, labels: Tensor, batch: int, temperature: float = 0.1):
        losses = _import_peer()
        # Room for the batch as well, which CrossBatchMemory stores before it compares.
        self._loss = losses.CrossBatchMemory(
            losses.SupConLoss(temperature=temperature),
            embedding_size=memory.shape[1],
            memory_size=len(memory) + batch,
        )
        self._loss.to(memory.device)
        self._loss.add_to_memory(memory, labels, len(memory))
        self._loss.has_been_filled = True

    def __call__(self, anchors: Tensor, labels: Tensor) -> Tensor:
        return self._loss(anchors, labels)


def _import_peer():
    try:
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise ValueError(
            "pytorch-metric-learning is not installed: pip install 'contrast_d2[bench]'"
        ) from error
    return losses
