from __future__ import annotations

import math

import pytest
import torch

from contrast_d2.evaluation.metrics import confusion_matrix, finite_scores, segmentation_scores

IGNORE = 255


def test_confusion_matrix_equals_a_loop_over_the_pixels():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randint(0, 4, (2, 13, 17), generator=generator)
    labels = torch.randint(0, 5, (2, 13, 17), generator=generator)
    labels[labels == 4] = IGNORE

    expected = torch.zeros(4, 4, dtype=torch.int64)
    pairs = torch.stack([labels, predictions], dim=-1).view(-1, 2)
    for truth, prediction in pairs.tolist():
        if truth != IGNORE:
            expected[truth, prediction] += 1
    assert not torch.equal(expected, expected.T)  # or rows and columns could be swapped unseen

    counted = confusion_matrix(predictions, labels.to(torch.uint8), 4, IGNORE)
    assert counted.dtype == torch.int64
    assert torch.equal(counted, expected)


def test_confusion_matrix_ignores_whatever_is_predicted_on_ignored_pixels():
    counted = confusion_matrix(torch.tensor([9, 1]), torch.tensor([IGNORE, 0]), 2, IGNORE)
    assert counted.tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([0, 1, 1], [0, 7, 7], r"2 pixels .* labels \[7\], predictions \[\]"),
        ([0, 3, -1], [0, 1, 1], r"2 pixels .* labels \[\], predictions \[-1, 3\]"),
    ],
)
def test_confusion_matrix_names_values_outside_the_classes(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(predictions), torch.tensor(labels), 2, IGNORE)


def test_confusion_matrix_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"\(4, 1\), labels \(4, 4\)"):
        confusion_matrix(
            torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64), 2, IGNORE
        )


# Class 2 is absent from the ground truth but predicted on 1 pixel, class 3 is absent altogether.
# IoU of class 0: 6/(8+8-6) = 0.6, of class 1: 2/(4+3-2) = 0.4; ACC 6/8 and 2/4.
ABSENT = torch.tensor([[6, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("policy", "miou", "macc"),
    [("zero_if_predicted", 1 / 3, 0.625), ("exclude", 0.5, 0.625), ("zero", 0.25, 0.3125)],
)
def test_scores_of_absent_classes(policy, miou, macc):
    scores = segmentation_scores(ABSENT, absent_classes=policy)
    assert scores.miou == pytest.approx(miou)
    assert scores.macc == pytest.approx(macc)
    assert scores.class_iou.tolist() == pytest.approx([0.6, 0.4, math.nan, math.nan], nan_ok=True)
    assert scores.class_acc.tolist() == pytest.approx([0.75, 0.5, math.nan, math.nan], nan_ok=True)
    assert scores.fwiou == pytest.approx((8 * 0.6 + 4 * 0.4) / 12)
    assert scores.pacc == pytest.approx(8 / 12)


@pytest.mark.parametrize("policy", ["zero_if_predicted", "exclude", "zero"])
def test_scores_without_a_labelled_pixel_are_nan(policy):
    scores = segmentation_scores(torch.zeros(3, 3, dtype=torch.int64), absent_classes=policy)
    values = [*scores[:4], *scores.class_iou, *scores.class_acc]
    assert len(values) == 10
    assert all(math.isnan(value) for value in values)


def test_unknown_policy_and_wrong_shape_are_errors():
    with pytest.raises(ValueError, match=r"'skip' is unknown; choose from .*exclude"):
        segmentation_scores(ABSENT, absent_classes="skip")
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        segmentation_scores(ABSENT[:2])


def test_finite_scores_keep_numbers_and_drop_the_rest():
    assert finite_scores({"a": 1.5, "b": math.nan, "c": math.inf}) == {
        "a": 1.5,
        "b": None,
        "c": None,
    }
