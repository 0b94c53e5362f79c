from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import contrast_d2.data  # noqa: F401  (registers the datasets)
from contrast_d2.evaluation import CityscapesScores, SemSegEvaluator
from contrast_d2.evaluation.cityscapes import AVERAGE_INSTANCE_SIZES
from tests.data import published

NAME = "cityscapes_fine_sem_seg_val"
CITY = "aachen"
# Label ids and train ids of the dataset.
ROAD, SKY, PERSON, CAR, BUS, CARAVAN = 7, 23, 24, 26, 28, 29
TRAIN_ID = {ROAD: 0, SKY: 10, PERSON: 11, CAR: 13, BUS: 15}


@pytest.fixture
def write_cityscapes(tmp_path: Path, monkeypatch):
    """Writes images of Cityscapes from their instance files, as they are published."""
    published.set_root(monkeypatch, tmp_path)

    def write(instance_maps: list[np.ndarray]) -> Path:
        images, labels = (
            tmp_path / "cityscapes" / kind / "val" / CITY for kind in ("leftImg8bit", "gtFine")
        )
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for i, instances in enumerate(instance_maps):
            stem = f"{CITY}_{i:06d}_000019"
            ids = np.where(instances >= 1000, instances // 1000, instances)
            train_ids = np.vectorize(lambda v: TRAIN_ID.get(v, 255))(ids)
            Image.new("RGB", ids.shape[::-1]).save(images / f"{stem}_leftImg8bit.png")
            for kind, values, dtype in (
                ("instanceIds", instances, np.uint16),
                ("labelIds", ids, np.uint8),
                ("labelTrainIds", train_ids, np.uint8),
            ):
                Image.fromarray(values.astype(dtype)).save(labels / f"{stem}_gtFine_{kind}.png")
            polygons = {"imgHeight": ids.shape[0], "imgWidth": ids.shape[1]}
            (labels / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
        return labels

    return write


def random_scene(seed: int) -> np.ndarray:
    """Stuff, instances of several classes and sizes, a group without instances, and void."""
    rng = np.random.default_rng(seed)
    scene = np.where(np.arange(32)[:, None] < 12, SKY, ROAD) * np.ones((32, 64), dtype=int)
    for number in range(12):
        label = rng.choice([PERSON, CAR, BUS, CARAVAN])
        y, x, h, w = rng.integers([0, 0, 2, 2], [26, 56, 12, 12])
        scene[y : y + h, x : x + w] = 1000 * label + number
    scene[:3, :9] = CAR  # a group of cars
    scene[-2:] = 1  # the ego vehicle, void
    return scene


def predict(scene: np.ndarray, seed: int) -> np.ndarray:
    """Train ids that are often right."""
    rng = np.random.default_rng(seed)
    ids = np.where(scene >= 1000, scene // 1000, scene)
    right = np.vectorize(lambda v: TRAIN_ID.get(v, 0))(ids)
    wrong = rng.choice(list(TRAIN_ID.values()), scene.shape)
    return np.where(rng.random(scene.shape) < 0.7, right, wrong).astype(np.uint8)


def evaluate(predictions: list[np.ndarray], absent_classes="zero_if_predicted") -> dict[str, float]:
    evaluator = SemSegEvaluator(
        NAME, measures=[CityscapesScores(NAME)], absent_classes=absent_classes
    )
    evaluator.reset()
    for record, predicted in zip(DatasetCatalog.get(NAME), predictions, strict=True):
        scores = torch.nn.functional.one_hot(torch.from_numpy(predicted).long(), 19)
        evaluator.process([record], [{"sem_seg": scores.permute(2, 0, 1).float()}])
    return evaluator.evaluate()["sem_seg"]


def test_scores_worked_out_by_hand(write_cityscapes):
    # Road; two cars, of 4 and 8 pixels; a bus of 4 pixels; a group of cars, 4 pixels.
    scene = np.full((8, 8), ROAD)
    scene[0, :4], scene[1], scene[2, :4], scene[3, :4] = 26000, 26001, 28000, CAR
    predicted = np.zeros((8, 8), dtype=np.uint8)
    predicted[0, :4] = TRAIN_ID[CAR]
    predicted[1, :2] = TRAIN_ID[CAR]
    predicted[1, 2:5] = TRAIN_ID[BUS]
    predicted[2, :4] = TRAIN_ID[CAR]
    predicted[7, :2] = TRAIN_ID[CAR]
    write_cityscapes([scene])
    scores = evaluate([predicted])

    car, bus = AVERAGE_INSTANCE_SIZES["car"], AVERAGE_INSTANCE_SIZES["bus"]
    # Cars: all of the first, a quarter of the second; false positives on the bus and the road.
    iiou_car = 100 * (car + car / 4) / (2 * car + 4 + 2)
    assert scores["iIoU-car"] == pytest.approx(iiou_car)
    assert scores["iIoU-bus"] == 0
    assert math.isnan(scores["iIoU-train"])
    assert scores["iIoU"] == pytest.approx(iiou_car / 2)
    # Vehicles: of 16 + 4 pixels 4 + 5 + 4 are found, and 2 pixels of road are taken for one.
    assert scores["IoUcat-vehicle"] == pytest.approx(100 * 13 / (4 + 8 + 4 + 4 + 2))
    # As before with 5 of 8 pixels of the second car, and the bus.
    found, truth = car + car * 5 / 8 + bus, 2 * car + bus
    assert scores["iIoUcat-vehicle"] == pytest.approx(100 * found / (truth + 2))
    assert scores["iIoUcat"] == scores["iIoUcat-vehicle"]
    road = 100 * (44 - 2) / (44 + 3 + 4)
    assert scores["IoUcat-flat"] == pytest.approx(road)
    assert scores["IoUcat"] == pytest.approx((road + scores["IoUcat-vehicle"]) / 2)
    assert [n for n in scores if n.startswith("iIoUcat-")] == ["iIoUcat-human", "iIoUcat-vehicle"]


def test_equals_cityscapes_scripts_on_the_same_files(write_cityscapes, tmp_path, monkeypatch):
    # The package calls what newer versions of numpy have no more.
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    theirs = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    scenes = [random_scene(i) for i in range(3)]
    labels = write_cityscapes(scenes)
    predictions = [predict(scene, i) for i, scene in enumerate(scenes)]
    ours = evaluate(predictions)

    by_train_id = {train_id: label for label, train_id in TRAIN_ID.items()}
    pairs = []
    for i, predicted in enumerate(predictions):
        path = tmp_path / f"{i}.png"
        ids = np.vectorize(by_train_id.get)(predicted)
        Image.fromarray(ids.astype(np.uint8)).save(path)
        pairs.append((str(path), str(labels / f"{CITY}_{i:06d}_000019_gtFine_labelIds.png")))
    theirs.args.quiet, theirs.args.JSONOutput = True, False
    expected = theirs.evaluateImgLists(*(list(x) for x in zip(*pairs, strict=True)), theirs.args)
    compared = {
        "mIoU": expected["averageScoreClasses"],
        "iIoU": expected["averageScoreInstClasses"],
        "IoUcat": expected["averageScoreCategories"],
        "iIoUcat": expected["averageScoreInstCategories"],
    }
    for ours_name, theirs_name in (
        ("IoU", "classScores"),
        ("iIoU", "classInstScores"),
        ("IoUcat", "categoryScores"),
        ("iIoUcat", "categoryInstScores"),
    ):
        for name, score in expected[theirs_name].items():
            if not math.isnan(score):
                compared[f"{ours_name}-{name}"] = score
    assert len(compared) == 4 + 5 + 3 + 5 - 1 + 2
    for name, score in compared.items():
        assert ours[name] == pytest.approx(100 * score, rel=1e-12), name


def test_missing_or_strange_files_are_errors(write_cityscapes):
    labels = write_cityscapes([random_scene(0)])
    (path,) = labels.glob("*_instanceIds.png")
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"instanceIds.png is \(4, 4\)"):
        evaluate([predict(random_scene(0), 0)])
    Image.fromarray(np.zeros((32, 64), dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match="instanceIds.png.*16 bits"):
        evaluate([predict(random_scene(0), 0)])
    write_cityscapes([random_scene(0), random_scene(1)])
    sorted(labels.glob("*_instanceIds.png"))[1].unlink()  # detectron2 looks for the first only
    with pytest.raises(ValueError, match="1 files of instances .*gtFine_trainvaltest.zip"):
        CityscapesScores(NAME)
    with pytest.raises(ValueError, match="camvid_sem_seg_val has not the classes"):
        CityscapesScores("camvid_sem_seg_val")


def test_average_sizes_are_of_all_classes_that_have_instances():
    metadata = MetadataCatalog.get(NAME)
    groups = dict(metadata.class_groups)
    members = {metadata.stuff_classes[k] for g in ("human", "vehicle") for k in groups[g]}
    assert members == set(AVERAGE_INSTANCE_SIZES)
