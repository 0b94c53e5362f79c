from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from contrast_d2.evaluation.metrics import (
    confusion_matrix,
    finite_scores,
    frequency_groups,
    group_miou,
    merge_classes,
    predicted_classes,
    segmentation_scores,
)

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
    # Bytes are counted another way.
    counted = confusion_matrix(predictions.byte(), labels.byte(), 4, IGNORE)
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


def test_confusion_matrix_of_bytes_names_values_outside_the_classes():
    predictions, labels = torch.tensor([0, 9, 9]).byte(), torch.tensor([7, 0, IGNORE]).byte()
    with pytest.raises(ValueError, match=r"2 pixels .* labels \[7\], predictions \[9\]"):
        confusion_matrix(predictions, labels, 2, IGNORE)


def test_predicted_classes_equal_argmax(subtests: pytest.Subtests) -> None:
    for dtype in [torch.float32, torch.bfloat16]:
        for num_classes in [2, 255]:
            with subtests.test(dtype=dtype):
                # More pixels than are compared at a time; so few values that there are many ties.
                generator = torch.Generator().manual_seed(0)
                scores = torch.randint(0, 9, (num_classes, 190, 181), generator=generator).to(dtype)
                predictions = predicted_classes(scores)
                assert predictions.dtype == torch.uint8
                assert torch.equal(predictions.long(), scores.argmax(dim=0))
                channels_last = scores.permute(1, 2, 0).contiguous().permute(2, 0, 1)
                for same in (scores.mT, channels_last):
                    assert torch.equal(predicted_classes(same).long(), same.argmax(dim=0))


def test_predicted_classes_equal_argmax_where_scores_are_not_finite():
    scores = torch.randn(3, 4, 5)
    scores[1, 0, 0], scores[2, 1, 1], scores[:, 2, 2] = math.nan, math.inf, -math.inf
    assert torch.equal(predicted_classes(scores).long(), scores.argmax(dim=0))


def test_confusion_matrix_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"\(4, 1\), labels \(4, 4\)"):
        confusion_matrix(
            torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64), 2, IGNORE
        )


# Class 2 is absent from the ground truth but predicted on 1 pixel, class 3 is absent altogether.
# IoU of class 0: 6/(8+8-6) = 0.6, of class 1: 2/(4+3-2) = 0.4; ACC 6/8 and 2/4.
ABSENT = torch.tensor([[6, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_scores_of_absent_classes(subtests: pytest.Subtests) -> None:
    for policy, miou, macc in [
        ("zero_if_predicted", 1 / 3, 0.625),
        ("exclude", 0.5, 0.625),
        ("zero", 0.25, 0.3125),
    ]:
        with subtests.test(policy=policy):
            scores = segmentation_scores(ABSENT, absent_classes=policy)
            assert scores.miou == pytest.approx(miou)
            assert scores.macc == pytest.approx(macc)
            assert scores.class_iou.tolist() == pytest.approx(
                [0.6, 0.4, math.nan, math.nan], nan_ok=True
            )
            assert scores.class_acc.tolist() == pytest.approx(
                [0.75, 0.5, math.nan, math.nan], nan_ok=True
            )
            assert scores.fwiou == pytest.approx((8 * 0.6 + 4 * 0.4) / 12)
            assert scores.pacc == pytest.approx(8 / 12)


def test_scores_without_a_labelled_pixel_are_nan(subtests: pytest.Subtests) -> None:
    for policy in ["zero_if_predicted", "exclude", "zero"]:
        with subtests.test(policy=policy):
            scores = segmentation_scores(
                torch.zeros(3, 3, dtype=torch.int64), absent_classes=policy
            )
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


def test_group_miou_is_the_mean_of_the_classes_under_each_policy():
    groups = {"all": (0, 1, 2, 3), "pair": (1, 2), "absent": (2,), "nowhere": (3,)}
    found = {
        policy: group_miou(ABSENT, groups, absent_classes=policy)
        for policy in ("zero_if_predicted", "exclude", "zero")
    }
    nan = math.nan
    assert found["zero_if_predicted"] == pytest.approx(
        {"all": 1 / 3, "pair": 0.2, "absent": 0.0, "nowhere": nan}, nan_ok=True
    )
    assert found["exclude"] == pytest.approx(
        {"all": 0.5, "pair": 0.4, "absent": nan, "nowhere": nan}, nan_ok=True
    )
    assert found["zero"] == pytest.approx({"all": 0.25, "pair": 0.2, "absent": 0.0, "nowhere": 0.0})


def test_merged_classes_forgive_confusions_within_a_group():
    confusion = torch.tensor([[5, 1, 2], [3, 4, 0], [6, 0, 7]])
    merged = merge_classes(confusion, {"last": (2,), "first": (1, 0)})
    assert merged.tolist() == [[7, 6], [2, 13]]
    with pytest.raises(ValueError, match=r"'one'.*3 classes.*\[0, 1\]"):
        merge_classes(confusion, {"one": (0, 1)})


def test_head_mid_and_tail_are_thirds_by_frequency():
    pixels = np.array([3, 90, 5, 0, 90, 40, 7])
    assert frequency_groups(pixels) == {"head": [1, 4, 5], "mid": [6, 2], "tail": [0, 3]}
