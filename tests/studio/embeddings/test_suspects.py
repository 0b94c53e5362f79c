"""Which labels are listed as possibly wrong."""

from __future__ import annotations

import numpy as np

from contrast_d2.studio.embeddings import label_suspects

LABELS = np.array([0, 0, 0, 0])
EVERY = np.ones(4, bool)
FIRST = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0, 0, 1.0], [0.5, 0.5, 0]])


def test_the_largest_lead_over_the_label_comes_first() -> None:
    found = label_suspects([FIRST], LABELS, EVERY, 9)
    assert [(s.pixel, s.vote) for s in found] == [(2, 2), (1, 1)]
    assert (found[1].vote_share, found[1].label_share) == (0.8, 0.2)
    assert [s.pixel for s in label_suspects([FIRST], LABELS, EVERY, 1)] == [2]


def test_a_pixel_on_a_boundary_is_not_asked_about() -> None:
    eligible = np.array([True, True, False, True])
    assert [s.pixel for s in label_suspects([FIRST], LABELS, eligible, 9)] == [1]


def test_models_vote_together() -> None:
    second = FIRST.copy()
    second[2] = [1, 0, 0]  # places this pixel with its label
    found = label_suspects([FIRST, second], LABELS, EVERY, 9)
    assert [s.pixel for s in found] == [1]
