from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from contrast_d2.evaluation import PositionPrior, evaluate_position_prior, most_frequent_labels
from contrast_d2.evaluation.evaluator import SemSegEvaluator

VOID = 255


def test_most_frequent_labels_count_positions_without_void():
    label_maps = [
        np.array([[0, 1, VOID, 2]]),
        np.array([[0, 1, VOID, 1]]),
        np.array([[1, VOID, VOID, 1]]),
        np.array([[VOID, VOID, VOID, 2]]),
    ]
    # The third position is never labelled; the fourth is tied between 1 (5 pixels in all) and 2.
    labels = most_frequent_labels(label_maps, num_classes=3, ignore_label=VOID)
    assert labels.tolist() == [[0, 1, 1, 1]]


def test_ties_go_to_the_class_with_more_pixels_not_to_the_smaller_id():
    label_maps = [np.array([[0, 1, 1]]), np.array([[1, 1, 1]])]
    labels = most_frequent_labels(label_maps, num_classes=2, ignore_label=VOID)
    assert labels.tolist() == [[1, 1, 1]]


def test_maps_of_another_size_are_resized_to_the_first():
    large = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, VOID, VOID], [2, 2, VOID, VOID]])
    first = np.full((2, 2), VOID)
    labels = most_frequent_labels([first, large, large], num_classes=3, ignore_label=VOID)
    # Ties of pixels in all (0, 1 and 2 have two each) leave the order of the classes.
    assert labels.tolist() == [[0, 1], [2, 0]]


def test_nothing_to_count_is_an_error():
    for label_maps in ([], [np.full((2, 2), VOID)]):
        with pytest.raises(ValueError, match="no label map holds a labelled pixel"):
            most_frequent_labels(label_maps, num_classes=3, ignore_label=VOID)


def test_prior_answers_at_the_size_that_is_asked_for():
    prior = PositionPrior(torch.tensor([[0, 2], [1, 1]]), num_classes=3)
    small, large = prior([{"height": 2, "width": 2}, {"height": 4, "width": 6}])
    assert small["sem_seg"].shape == (3, 2, 2)
    assert small["sem_seg"].argmax(dim=0).tolist() == [[0, 2], [1, 1]]
    rows = [[0, 0, 0, 2, 2, 2]] * 2 + [[1] * 6] * 2
    assert large["sem_seg"].argmax(dim=0).tolist() == rows


def test_evaluation_scores_the_prior_of_the_other_dataset(make_dataset):
    train = [np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]), np.array([[0, 0, 1, VOID]])]
    name = make_dataset(train, ("a", "b"))
    val = make_dataset([np.array([[0, 1, 1, VOID]]), np.array([[0, 0, 1, 1]])], ("a", "b"))
    scores = evaluate_position_prior(name, val)["sem_seg"]
    # The prior is 0 0 1 1, so one pixel of class 1 is taken for class 0.
    assert scores["IoU-a"] == pytest.approx(100 * 3 / 4)
    assert scores["IoU-b"] == pytest.approx(100 * 3 / 4)
    assert scores["pACC"] == pytest.approx(100 * 6 / 7)


def test_datasets_of_different_classes_and_unknown_ones_are_errors(make_dataset):
    train = make_dataset([np.zeros((2, 2))], ("a", "b"))
    val = make_dataset([np.zeros((2, 2))], ("a", "c"))
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*\['a', 'c'\]"):
        evaluate_position_prior(train, val)
    with pytest.raises(ValueError, match="no_such_dataset"):
        evaluate_position_prior("no_such_dataset", val)


def test_prior_of_real_labels_beats_the_best_constant(camvid, make_dataset):
    from PIL import Image

    paths = sorted((camvid / "annotations/train").glob("*.png"))[::40]
    label_maps = [np.asarray(Image.open(path)) for path in paths]
    name = make_dataset([np.where(x == 11, VOID, x) for x in label_maps], list("abcdefghijk"))
    scores = evaluate_position_prior(name, name)["sem_seg"]

    counts = np.stack([sum((x == k).astype(int) for x in label_maps) for k in range(11)])
    # On the data that it counted, the prior is right exactly as often as its count says.
    assert scores["pACC"] == pytest.approx(100 * counts.max(axis=0).sum() / counts.sum())
    constant = PositionPrior(torch.full((360, 480), 3), 11)
    evaluator = SemSegEvaluator(name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], constant([record]))
    assert scores["mIoU"] > 2 * evaluator.evaluate()["sem_seg"]["mIoU"]
