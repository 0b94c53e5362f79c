"""Pixels whose label the pixels around them in embedding space do not share.

Shape letters: A pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Suspect(NamedTuple):
    """A pixel whose label may be wrong.

    Attributes:
        pixel: its index.
        vote: the class that most neighbours have.
        vote_share: the share of the neighbours that has it, 0..1, over all models.
        label_share: the share that has the pixel's label.
    """

    pixel: int
    vote: int
    vote_share: float
    label_share: float


def label_suspects(
    votes: Sequence[np.ndarray], labels: np.ndarray, eligible: np.ndarray, most: int
) -> list[Suspect]:
    """The pixels whose neighbours agree most on another class than the label's.

    Where several models are compared their votes count alike: a pixel that one model alone
    confuses ranks below one that all of them place among another class.

    Args:
        votes: for each model (A, K), the share of the neighbours that each class has.
        labels: (A,) integers in 0..K-1.
        eligible: (A,) bool, the pixels that are asked about; one on the boundary of two classes has
            an embedding of both, which says nothing about its label.
        most: how many at most.

    Returns:
        Those whose neighbours have another class more often than the label's, the largest lead
        first.
    """
    shares = np.mean(votes, axis=0)
    rows = np.arange(len(labels))
    vote = shares.argmax(axis=1)
    lead = shares[rows, vote] - shares[rows, labels]
    order = np.argsort(-lead, kind="stable")
    order = order[(lead[order] > 0) & np.asarray(eligible)[order]][:most]
    return [
        Suspect(int(i), int(vote[i]), float(shares[i, vote[i]]), float(shares[i, labels[i]]))
        for i in order
    ]
