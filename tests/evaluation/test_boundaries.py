from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from contrast_d2.evaluation import BoundaryIoU, TrimapIoU, segmentation_scores
from contrast_d2.evaluation.boundaries import boundary_counts, near_other_label

VOID = 255


def regions(seed: int, size: tuple[int, int]) -> torch.Tensor:
    """A map of a few classes in blobs, with some void."""
    values = np.random.default_rng(seed).normal(size=(5, *size))
    smooth = np.stack([ndimage.gaussian_filter(v, 3) for v in values]).argmax(axis=0)
    return torch.from_numpy(np.where(smooth == 4, VOID, smooth).astype(np.uint8))


def erosion(mask: np.ndarray, distance: int, beyond: bool) -> np.ndarray:
    """As many erosions by 3x3 pixels as the distance says."""
    return ndimage.binary_erosion(
        mask, np.ones((3, 3)), iterations=distance, border_value=int(beyond)
    )


def test_near_other_label_equals_the_erosion_of_every_mask(subtests: pytest.Subtests) -> None:
    for distance in [1, 2, 3, 4, 7, 30]:
        with subtests.test(distance=distance):
            labels = regions(0, (37, 53))
            inner = np.zeros(labels.shape, dtype=bool)
            for value in labels.unique().tolist():
                inner |= erosion(labels.numpy() == value, distance, beyond=True)
            near = near_other_label(labels, distance)
            assert torch.equal(near, torch.from_numpy(~inner))
            assert near.all() == (distance >= 7)


def test_nothing_is_near_in_an_image_of_one_label():
    assert not near_other_label(torch.full((6, 9), 3, dtype=torch.uint8), 4).any()


def test_boundary_counts_equal_those_of_single_masks(subtests: pytest.Subtests) -> None:
    for distance in [1, 3, 8]:
        with subtests.test(distance=distance):
            labels, predictions = regions(0, (37, 53)), regions(1, (37, 53)) % 4
            counts = boundary_counts(predictions, labels, 4, VOID, distance)
            assert counts.shape == (3, 4) and counts.dtype == torch.int64

            truth = labels.numpy()
            predicted = np.where(truth == VOID, VOID, predictions.numpy())
            for k in range(4):
                bands = [
                    m & ~erosion(m, distance, beyond=False) for m in (truth == k, predicted == k)
                ]
                expected = [bands[0].sum(), bands[1].sum(), (bands[0] & bands[1]).sum()]
                assert counts[:, k].tolist() == expected
                assert min(expected) > 0


def test_unlabelled_pixels_bound_predictions_as_they_bound_labels(make_dataset):
    labels = regions(2, (40, 40))
    predictions = torch.where(labels == VOID, 0, labels)
    measure = BoundaryIoU(make_dataset([labels.numpy()], "abcd"), ratio=0.05)
    scores = measure.scores(measure.count(predictions, labels, ""), torch.empty(0), "exclude")
    assert scores["boundary_mIoU"] == 1


def test_eroded_label_values_are_no_boundaries():
    """Eroding a label map by its values, as newer detectron2 does, sees only differences of ids.

    Left 1 and right 2 against left 2 and right 3: no pixel is right. Yet along the seam both
    values exceed the lowest in their window by one, which counts as class 1 in both.
    """
    labels = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2], dtype=torch.uint8).repeat(8, 1)
    predictions = labels + 1
    by_values = [x - ndimage.grey_erosion(x, (3, 3)) for x in (labels.numpy(), predictions.numpy())]
    np.testing.assert_array_equal(*by_values)
    assert by_values[0].sum(axis=0).tolist() == [0, 0, 0, 0, 8, 0, 0, 0]

    labelled, predicted, both = boundary_counts(predictions, labels, 4, VOID, 1).tolist()
    assert both == [0, 0, 0, 0]
    # Each half, 8x4 pixels, has a band all around it.
    assert labelled == [0, 20, 20, 0]
    assert predicted == [0, 0, 20, 20]


def test_boundary_iou_divides_sums_over_images(make_dataset):
    # One class of 4x4 pixels in the middle of 16x16; predicted one pixel too far to the right.
    labels = torch.zeros(16, 16, dtype=torch.uint8)
    labels[6:10, 6:10] = 1
    measure = BoundaryIoU(make_dataset([labels.numpy()], ("sky", "car", "bus")), ratio=0.02)
    counts = measure.count(labels.roll(1, dims=1), labels, "") + measure.count(labels, labels, "")
    # The ring of a square has 12 pixels; of rings moved by one, two sides of three pixels overlap.
    assert counts[:, 1].tolist() == [24, 24, 12 + 6]
    scores = measure.scores(counts, torch.empty(0), "exclude")
    assert scores["boundary_IoU-car"] == pytest.approx(18 / 30)
    assert math.isnan(scores["boundary_IoU-bus"])
    expected = (scores["boundary_IoU-sky"] + 18 / 30) / 2
    assert scores["boundary_mIoU"] == pytest.approx(expected)
    assert measure.scores(counts, torch.empty(0), "zero")["boundary_mIoU"] == pytest.approx(
        expected * 2 / 3
    )


def test_width_of_boundaries_follows_the_diagonal(make_dataset):
    labels = torch.zeros(30, 40, dtype=torch.uint8)  # the diagonal is 50
    measure = BoundaryIoU(make_dataset([labels.numpy()], ("sky",)), ratio=0.06)
    assert measure.count(labels, labels, "")[0].tolist() == [30 * 40 - 24 * 34]


def test_trimap_is_the_miou_of_the_band(make_dataset):
    labels, predictions = regions(0, (37, 53)), regions(3, (37, 53)) % 4
    measure = TrimapIoU(make_dataset([labels.numpy()], "abcd"), widths=(2, 5))
    scores = measure.scores(measure.count(predictions, labels, ""), torch.empty(0), "exclude")
    assert list(scores) == ["trimap_mIoU_2px", "trimap_mIoU_5px"]
    for width in (2, 5):
        matrix = torch.zeros(4, 4, dtype=torch.int64)
        for y, x in np.ndindex(*labels.shape):
            around = labels[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
            if labels[y, x] != VOID and (around != labels[y, x]).any():
                matrix[labels[y, x].item(), predictions[y, x].item()] += 1
        assert scores[f"trimap_mIoU_{width}px"] == segmentation_scores(matrix).miou
    assert scores["trimap_mIoU_2px"] != scores["trimap_mIoU_5px"]


def test_wrong_widths_are_errors(make_dataset):
    name = make_dataset([np.zeros((2, 2))], ("a",))
    with pytest.raises(ValueError, match=r"widths=\(5, 0\)"):
        TrimapIoU(name, widths=(5, 0))
    with pytest.raises(ValueError, match="ratio=2"):
        BoundaryIoU(name, ratio=2)
    with pytest.raises(ValueError, match="no_such_dataset"):
        BoundaryIoU("no_such_dataset")
