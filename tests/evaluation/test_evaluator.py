from __future__ import annotations

import csv
import errno
import gc
import inspect
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as DetectronSemSegEvaluator
from matplotlib.figure import Figure
from PIL import Image

import contrast_d2.data  # noqa: F401  (registers the datasets)
from contrast_d2.evaluation import BoundaryIoU, Measure, SemSegEvaluator, TrimapIoU
from contrast_d2.evaluation import evaluator as module
from contrast_d2.evaluation.confusion_files import plot_confusion, write_confusion_picture
from contrast_d2.files import DiskFullError
from tests.helpers import run_processes

from .catalog import register

CLASSES = ("sky", "road", "car", "bike")
VOID = 255
# Versions after v0.6 leave absent classes out of the mean; they also take a loading function.
IS_V06 = "sem_seg_loading_fn" not in inspect.signature(DetectronSemSegEvaluator).parameters
DETECTRON_POLICY = "zero_if_predicted" if IS_V06 else "exclude"


def random_labels(seed: int, size: tuple[int, int], present: Sequence[int]) -> np.ndarray:
    generator = np.random.default_rng(seed)
    labels = generator.choice(np.array([*present, VOID], dtype=np.uint8), size)
    return labels.repeat(3, axis=0)


def scores_like(labels: np.ndarray, seed: int, num_classes: int, never: int | None) -> torch.Tensor:
    """Class scores whose argmax is often, not always, the label."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_classes, *labels.shape, generator=generator)
    truth = torch.from_numpy(np.where(labels == VOID, 0, labels)).long()
    scores += 1.5 * torch.nn.functional.one_hot(truth, num_classes).permute(2, 0, 1)
    if never is not None:
        scores[never] = -100.0
    return scores


def run(evaluator, records: Sequence[dict], outputs: Sequence[torch.Tensor]):
    evaluator.reset()
    for record, scores in zip(records, outputs, strict=True):
        evaluator.process([record], [{"sem_seg": scores}])
    return evaluator.evaluate()


def assert_same(results: dict, expected: dict) -> None:
    """Same keys in the same order, and the very same numbers."""
    assert list(results) == list(expected) == ["sem_seg"]
    assert list(results["sem_seg"]) == list(expected["sem_seg"])
    np.testing.assert_array_equal(
        list(results["sem_seg"].values()), list(expected["sem_seg"].values())
    )


@pytest.mark.parametrize(
    ("present", "never_predicted"),
    [((0, 1, 2, 3), None), ((0, 1, 3), None), ((0, 1, 3), 2)],
    ids=["all classes", "absent but predicted", "absent and not predicted"],
)
def test_equals_detectron2(make_dataset, tmp_path, present, never_predicted):
    labels = [random_labels(i, (7 + i, 16), present) for i in range(4)]
    name = make_dataset(labels, CLASSES)
    outputs = [scores_like(x, i, len(CLASSES), never_predicted) for i, x in enumerate(labels)]
    records = DatasetCatalog.get(name)
    theirs_dir, ours_dir = tmp_path / "theirs", tmp_path / "ours"

    theirs = DetectronSemSegEvaluator(name, distributed=False, output_dir=str(theirs_dir))
    expected = run(theirs, records, outputs)
    ours = SemSegEvaluator(
        name,
        output_dir=str(ours_dir),
        absent_classes=DETECTRON_POLICY,
        save_predictions=True,
    )
    assert_same(run(ours, records, outputs), expected)
    assert math.isnan(expected["sem_seg"]["IoU-car"]) == (2 not in present)
    predictions = "sem_seg_predictions.json"
    assert (ours_dir / predictions).read_text() == (theirs_dir / predictions).read_text()


def test_equals_detectron2_on_real_labels(camvid):
    paths = sorted((camvid / "annotations/val").glob("*.png"))[::20]
    name = "camvid_sem_seg_val"
    records = {record["sem_seg_file_name"]: record for record in DatasetCatalog.get(name)}
    records = [records[str(path)] for path in paths]
    labels = [np.asarray(Image.open(path)) for path in paths]
    # detectron2's own evaluator reads void, 11, as the column that it reserves for ignored pixels.
    labels = [np.where(x == 11, VOID, x) for x in labels]
    outputs = [scores_like(x, i, 11, None) for i, x in enumerate(labels)]

    expected = run(DetectronSemSegEvaluator(name, distributed=False), records, outputs)
    assert 20 < expected["sem_seg"]["mIoU"] < 80
    ours = SemSegEvaluator(name, absent_classes=DETECTRON_POLICY)
    assert_same(run(ours, records, outputs), expected)


def test_default_policy_gives_the_numbers_of_v06(make_dataset):
    # 3 of 4 pixels of class 0 are right, the fourth is predicted as the absent class 1.
    name = make_dataset([np.zeros((2, 2))], ("a", "b", "c"))
    scores = torch.zeros(3, 2, 2)
    scores[0] = 1
    scores[1, 0, 0] = 2
    records = DatasetCatalog.get(name)
    by_policy = {
        policy: run(SemSegEvaluator(name, **policy_argument), records, [scores])["sem_seg"]["mIoU"]
        for policy, policy_argument in {
            "default": {},
            "exclude": {"absent_classes": "exclude"},
            "zero": {"absent_classes": "zero"},
        }.items()
    }
    assert by_policy == pytest.approx({"default": 37.5, "exclude": 75.0, "zero": 25.0})


def test_files_are_finite_json_and_what_detectron2_writes(make_dataset, tmp_path, caplog):
    labels = [random_labels(0, (8, 8), (0, 1, 3))]
    name = make_dataset(labels, CLASSES)
    evaluator = SemSegEvaluator(name, output_dir=str(tmp_path / "out"))
    with caplog.at_level(logging.INFO, logger="contrast_d2"):
        results = run(evaluator, DatasetCatalog.get(name), [scores_like(labels[0], 0, 4, None)])

    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "sem_seg_evaluation.json",
        "sem_seg_evaluation.pth",
    }
    report = json.loads((tmp_path / "out" / "sem_seg_evaluation.json").read_text())
    assert (report["dataset"], report["images"]) == (name, 1)
    assert report["absent_classes"] == "zero_if_predicted"
    assert report["sem_seg"]["IoU-car"] is None
    assert report["sem_seg"]["IoU-road"] == results["sem_seg"]["IoU-road"]
    saved = torch.load(tmp_path / "out" / "sem_seg_evaluation.pth", weights_only=True)
    np.testing.assert_array_equal(list(saved.values()), list(results["sem_seg"].values()))
    absent = [r.getMessage() for r in caplog.records if "absent from the" in r.getMessage()]
    assert len(absent) == 1
    assert absent[0].endswith(": car")


def test_labels_without_a_class_give_nan_and_a_warning(make_dataset, caplog):
    name = make_dataset([np.full((4, 4), VOID)], CLASSES)
    results = run(SemSegEvaluator(name), DatasetCatalog.get(name), [torch.randn(4, 4, 4)])
    assert all(math.isnan(value) for value in results["sem_seg"].values())
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"{name}: no labelled pixel was evaluated, so every score is nan"]


def test_reset_forgets(make_dataset):
    labels = [random_labels(i, (8, 8), (0, 1, 2, 3)) for i in range(2)]
    name = make_dataset(labels, CLASSES)
    records = DatasetCatalog.get(name)
    outputs = [scores_like(x, i, 4, None) for i, x in enumerate(labels)]
    evaluator = SemSegEvaluator(name)
    first = run(evaluator, records[:1], outputs[:1])
    run(evaluator, records, outputs)
    assert_same(run(evaluator, records[:1], outputs[:1]), first)


def test_errors_name_the_file_and_the_sizes(make_dataset, tmp_path):
    name = make_dataset([np.zeros((4, 6))], CLASSES)
    (record,) = DatasetCatalog.get(name)
    evaluator = SemSegEvaluator(name)
    evaluator.reset()
    with pytest.raises(ValueError, match=rf"{record['file_name']}.*\(4, 5\).*\(4, 6\)"):
        evaluator.process([record], [{"sem_seg": torch.zeros(4, 4, 5)}])
    with pytest.raises(ValueError, match=rf"{record['file_name']}.*\(19, 4, 6\).*\(4, H, W\)"):
        evaluator.process([record], [{"sem_seg": torch.zeros(19, 4, 6)}])
    with pytest.raises(ValueError, match=f"elsewhere.jpg is not an image of {name}"):
        evaluator.process([{"file_name": "elsewhere.jpg"}], [{"sem_seg": torch.zeros(4, 4, 6)}])
    with pytest.raises(ValueError, match="needs an output_dir"):
        SemSegEvaluator(name, save_predictions=True)
    with pytest.raises(ValueError, match="'mean' is unknown"):
        SemSegEvaluator(name, absent_classes="mean")
    with pytest.raises(ValueError, match="no_such_dataset"):
        SemSegEvaluator("no_such_dataset")


def test_confusion_matrix_is_saved_as_table_and_picture(make_dataset, tmp_path):
    name = make_dataset([np.array([[0, 0, 1, VOID]])], ("sky", "road, wet", "car"))
    predicted = torch.tensor([[0, 2, 1, 1]])
    scores = torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1).float()
    run(SemSegEvaluator(name, output_dir=str(tmp_path / "out")), DatasetCatalog.get(name), [scores])
    with open(tmp_path / "out/confusion_matrix.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["true \\ predicted", "sky", "road, wet", "car"],
        ["sky", "1", "0", "1"],
        ["road, wet", "0", "1", "0"],
        ["car", "0", "0", "0"],
    ]
    with Image.open(tmp_path / "out/confusion_matrix.png") as picture:
        assert min(picture.size) > 300

    axes = plot_confusion(torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]]), "abc").axes[0]
    drawn = axes.images[0].get_array().filled(-1)
    np.testing.assert_array_equal(drawn, [[50, 0, 50], [0, 100, 0], [-1, -1, -1]])
    assert [text.get_text() for text in axes.texts] == ["50", "50", "100"]
    assert not plot_confusion(torch.eye(26), [str(k) for k in range(26)]).axes[0].texts


def test_a_written_picture_is_gone_from_memory(tmp_path):
    def figures():
        return sum(isinstance(thing, Figure) for thing in gc.get_objects())

    gc.collect()  # of other tests
    before = figures()
    write_confusion_picture(torch.eye(3), "abc", str(tmp_path / "confusion.png"))
    assert figures() == before


def test_groups_of_the_dataset_and_of_the_training_set(make_dataset, monkeypatch, tmp_path):
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(tmp_path))
    labels = [random_labels(0, (8, 8), (0, 1, 2, 3))]
    name = make_dataset(labels, CLASSES)
    # In the training sets, bikes are most frequent, and cars do not occur.
    train = [
        make_dataset([np.array([[3, 3, 3, 0]])], CLASSES),
        make_dataset([np.array([[1, 1, 0, 0]])], CLASSES),
    ]
    MetadataCatalog.get(name).class_groups = {"vehicles": (2, 3)}
    outputs = [scores_like(labels[0], 0, 4, None)]
    evaluator = SemSegEvaluator(name, train_dataset=train)
    scores = run(evaluator, DatasetCatalog.get(name), outputs)["sem_seg"]
    iou = {c: scores[f"IoU-{c}"] for c in CLASSES}
    assert len({round(v, 6) for v in iou.values()}) == 4
    assert {n: v for n, v in scores.items() if n.startswith("mIoU-")} == pytest.approx(
        {
            "mIoU-vehicles": (iou["car"] + iou["bike"]) / 2,
            "mIoU-head": (iou["bike"] + iou["sky"]) / 2,
            "mIoU-mid": iou["road"],
            "mIoU-tail": iou["car"],
        }
    )
    other = make_dataset([np.zeros((1, 1))], ("a", "b"))
    with pytest.raises(ValueError, match=rf"train_dataset={other} has 2 classes"):
        SemSegEvaluator(name, train_dataset=other)


def test_a_measure_is_of_the_dataset_that_is_evaluated(make_dataset):
    name, other = (make_dataset([np.zeros((4, 4))], CLASSES) for _ in range(2))
    with pytest.raises(ValueError, match=f"a BoundaryIoU is for {other}, but {name}"):
        SemSegEvaluator(name, measures=[BoundaryIoU(other)])


def _measures(name: str) -> list[Measure]:
    return [BoundaryIoU(name, ratio=0.1), TrimapIoU(name, widths=(1, 2))]


def _distributed_labels() -> list[np.ndarray]:
    return [random_labels(i, (6, 12), (0, 1, 3)) for i in range(3)]


def _evaluate_share(folder: str) -> None:
    """Two processes share the images; then one of them gets all and the other none."""
    rank = dist.get_rank()
    labels = _distributed_labels()
    data_dir = Path(folder) / f"rank{rank}"
    data_dir.mkdir()
    for name, shares in {"both": ([0, 1], [2]), "one": ([0, 1, 2], [])}.items():
        register(name, data_dir, labels, CLASSES)
        share = shares[rank]
        evaluator = SemSegEvaluator(
            name,
            output_dir=str(Path(folder) / name),
            save_predictions=True,
            measures=_measures(name),
        )
        records = [DatasetCatalog.get(name)[i] for i in share]
        outputs = [scores_like(labels[i], i, len(CLASSES), None) for i in share]
        results = run(evaluator, records, outputs)
        assert (results is None) == (rank == 1)


@pytest.mark.slow
def test_two_processes_equal_one(make_dataset, tmp_path):
    labels = _distributed_labels()
    name = make_dataset(labels, CLASSES)
    outputs = [scores_like(x, i, len(CLASSES), None) for i, x in enumerate(labels)]
    evaluator = SemSegEvaluator(
        name,
        output_dir=str(tmp_path / "alone"),
        save_predictions=True,
        measures=_measures(name),
    )
    expected = run(evaluator, DatasetCatalog.get(name), outputs)

    assert {"boundary_mIoU", "trimap_mIoU_2px"} <= expected["sem_seg"].keys()

    run_processes(_evaluate_share, 2, str(tmp_path))
    for case in ("both", "one"):
        saved = torch.load(tmp_path / case / "sem_seg_evaluation.pth", weights_only=True)
        assert_same({"sem_seg": saved}, expected)
        alone, together = (
            json.loads((tmp_path / folder / "sem_seg_predictions.json").read_text())
            for folder in ("alone", case)
        )
        masks = [(m["category_id"], m["segmentation"]) for m in alone]
        assert masks == [(m["category_id"], m["segmentation"]) for m in together]
        report = json.loads((tmp_path / case / "sem_seg_evaluation.json").read_text())
        assert report["images"] == 3


def test_scores_that_are_not_finite_are_no_result(make_dataset, tmp_path, subtests):
    labels = [random_labels(i, (7, 16), (0, 1, 3)) for i in range(3)]
    name = make_dataset(labels, CLASSES)
    records = DatasetCatalog.get(name)
    for value in (math.nan, math.inf):
        with subtests.test(value=value):
            outputs = [scores_like(x, i, len(CLASSES), None) for i, x in enumerate(labels)]
            outputs[1][2, 3, 4] = value
            evaluator = SemSegEvaluator(name, output_dir=str(tmp_path / "scores"))
            with pytest.raises(FloatingPointError, match="1 of 3 images") as caught:
                run(evaluator, records, outputs)
            assert str(caught.value).startswith(records[1]["file_name"])
            assert not (tmp_path / "scores").exists()
    outputs = [scores_like(x, i, len(CLASSES), None) for i, x in enumerate(labels)]
    outputs[1][2] = -math.inf  # a class that a model rules out
    assert run(SemSegEvaluator(name), records, outputs)["sem_seg"]["mIoU"] > 0


@pytest.mark.gpu
def test_counts_stay_on_the_device(make_dataset):
    labels = [random_labels(i, (40, 90), (0, 1, 3)) for i in range(3)]
    name = make_dataset(labels, CLASSES)
    records = DatasetCatalog.get(name)
    outputs = [scores_like(x, i, len(CLASSES), None) for i, x in enumerate(labels)]
    expected = run(SemSegEvaluator(name), records, outputs)

    evaluator = SemSegEvaluator(name)
    assert_same(run(evaluator, records, [scores.cuda() for scores in outputs]), expected)
    evaluator.reset()
    evaluator.process(records[:1], [{"sem_seg": outputs[0].cuda()}])
    confusion = evaluator._confusion
    assert (confusion.device.type, confusion.dtype) == ("cuda", torch.int64)


def test_names_that_look_like_formulas_are_drawn(tmp_path: Path) -> None:
    names = ["$\\frac$", "a$b_c$", "line\nbreak"]
    write_confusion_picture(torch.eye(3), names, str(tmp_path / "confusion.png"))
    assert (tmp_path / "confusion.png").stat().st_size > 0
    figure = plot_confusion(torch.eye(3), names)
    assert not any(label.get_parse_math() for label in figure.axes[0].get_xticklabels())


def test_a_full_disk_and_a_picture_that_cannot_be_drawn(
    make_dataset, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    labels = random_labels(0, (8, 8), (0, 1, 2, 3))
    name = make_dataset([labels], CLASSES)
    outputs = [scores_like(labels, 0, 4, None)]

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(module, "write_confusion_picture", fail)
    evaluator = SemSegEvaluator(name, output_dir=str(tmp_path / "out"))
    with caplog.at_level("WARNING", "contrast_d2"):
        scores = run(evaluator, DatasetCatalog.get(name), outputs)["sem_seg"]
    assert set(scores) == evaluator.score_names
    assert "confusion_matrix.png could not be drawn" in caplog.text
    monkeypatch.setattr(module, "write_confusion_csv", fail)
    with pytest.raises(DiskFullError, match=f"{tmp_path / 'out'} could not be written"):
        run(evaluator, DatasetCatalog.get(name), outputs)
