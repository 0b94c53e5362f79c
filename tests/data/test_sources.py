"""Small datasets as their owners publish them, prepared and read through the mapper."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from contrast_d2.data import SemSegMapper
from contrast_d2.data.datasets import CATALOG, read_records
from contrast_d2.data.preparations import PREPARATIONS
from contrast_d2.data.prepare import run_plan
from contrast_d2.data.sources import CADIS_VIDEOS

from . import published


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    published.set_root(monkeypatch, tmp_path)
    return tmp_path


def prepare(dataset: str):
    return run_plan(PREPARATIONS[dataset](), workers=2, partial=True)


def mapped(name: str, record: int = 0) -> list[int]:
    """What each label value becomes: the first row of a record's labels."""
    sample = SemSegMapper(dataset_name=name, is_train=True)(read_records(name)[record])
    return sample["sem_seg"][0].tolist()


def classes_of(name: str, values: list[int]) -> list[str | None]:
    names = MetadataCatalog.get(name).stuff_classes
    return [None if value == 255 else names[value] for value in values]


def test_cityscapes(root) -> None:
    published.cityscapes(root)
    with pytest.raises(
        ValueError,
        match=r"labelTrainIds.*tools/prepare_dataset\.py cityscapes",
    ):
        read_records("cityscapes_fine_sem_seg_train")
    assert prepare("cityscapes").written == 4
    train = read_records("cityscapes_fine_sem_seg_train")
    ids = [Path(record["file_name"]).name.removesuffix("_leftImg8bit.png") for record in train]
    assert ids == ["aachen_000001_000019", "aachen_000002_000019", "ulm_000001_000019"]
    values = mapped("cityscapes_fine_sem_seg_val")
    label_ids = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    classes = {label_id: k for k, label_id in enumerate(label_ids)}
    assert values == [classes.get(i, 255) for i in range(34)] + [255]  # 255: license plate
    names = classes_of("cityscapes_fine_sem_seg_val", values)
    assert (names[7], names[26], names[33]) == ("road", "car", "bicycle")
    assert len(read_records("cityscapes_fine_sem_seg_trainval")) == 4


def test_cityscapes_test_has_no_labels(root) -> None:
    published.cityscapes(root)
    (record,) = read_records("cityscapes_fine_sem_seg_test_images")
    assert record.keys() == {"file_name", "image_id"}
    assert SemSegMapper(dataset_name="cityscapes_fine_sem_seg_test_images", is_train=False)(record)
    with pytest.raises(ValueError, match="train on a split that has labels"):
        SemSegMapper(dataset_name="cityscapes_fine_sem_seg_test_images", is_train=True)(record)


def test_ade20k(root) -> None:
    published.ade20k(root)
    with pytest.raises(
        ValueError,
        match=r"_detectron2/validation.*tools/prepare_dataset\.py ade20k",
    ):
        read_records("ade20k_sem_seg_val")
    assert prepare("ade20k").images == {"ade20k_sem_seg_train": 2, "ade20k_sem_seg_val": 2}
    for split in ("train", "val"):
        assert mapped(f"ade20k_sem_seg_{split}") == [255, *range(150)]


@pytest.mark.parametrize("folder", ["VOCdevkit/VOC2010", "VOC2010"])
def test_pascal_context_from_mat_files(root, folder) -> None:
    published.pascal_context_mat(root, folder)
    with pytest.raises(ValueError, match=r"tools/prepare_dataset\.py pascal_context"):
        read_records("pascal_context_59_sem_seg_train")
    assert prepare("pascal_context").written == 3
    train = read_records("pascal_context_60_sem_seg_train")
    assert [record["image_id"] for record in train] == published.PASCAL_SPLITS["train"]
    values = mapped("pascal_context_60_sem_seg_val")
    names = classes_of("pascal_context_60_sem_seg_val", values)
    labelled = {2: "aeroplane", 9: "bag", 18: "bed", 284: "person", 308: "pottedplant"}
    labelled |= {258: "motorbike", 259: "mountain", 260: "mouse", 427: "tvmonitor", 458: "wood"}
    assert {label: names[label] for label in labelled} == labelled
    assert (names[0], names[1], names[459]) == ("background",) * 3
    assert len(set(values)) == 60 and values.count(0) == 460 - 59
    # In 59 classes, all are one lower, and the background is void.
    assert mapped("pascal_context_59_sem_seg_val") == [v - 1 if v else 255 for v in values]


def test_pascal_context_from_masks(root) -> None:
    published.pascal_context_json(root, {2: [0, 1], 458: [2], 1: [3], 9: [1]})
    assert prepare("pascal_context").images == {
        "pascal_context_60_sem_seg_train": 2,
        "pascal_context_60_sem_seg_val": 1,
    }
    # Aeroplane, bag over it, wood, a label that is not kept, and what no mask covers.
    assert mapped("pascal_context_60_sem_seg_val") == [1, 2, 59, 0, 0, 0, 0, 0]


def test_masks_of_another_file_are_told(root) -> None:
    path = published.pascal_context_json(root, {2: [0]})
    data = json.loads(path.read_text())
    path.write_text(json.dumps({"images": data["images"], "annotations": []}))
    with pytest.raises(ValueError, match="trainval_merged.json.*annos_segmentation"):
        prepare("pascal_context")


def test_coco_stuff_releases_differ_by_one(root) -> None:
    published.coco_stuff_10k(root)
    published.coco_stuff_164k(root)
    with pytest.raises(ValueError, match=r"prepare_dataset\.py coco_stuff_10k"):
        read_records("coco_stuff_10k_sem_seg_train")
    assert prepare("coco_stuff_10k").written == 3
    assert len(read_records("coco_stuff_10k_sem_seg_train")) == 2
    small, large = "coco_stuff_10k_sem_seg_test", "coco_stuff_164k_sem_seg_val"
    assert mapped(small) == mapped(large) == [255, *range(171)]
    assert MetadataCatalog.get(small).stuff_classes == MetadataCatalog.get(large).stuff_classes
    # A file of one release read as the other's: 12 - 1 and 182 are no categories.
    for name, value in ((small, 12), (large, 182)):
        record = read_records(name)[0]
        published.write_png(Path(record["sem_seg_file_name"]), published.one_row([value] * 172))
        with pytest.raises(ValueError, match=rf"hold label values \[{value}\]"):
            mapped(name)


def test_camvid_original(root) -> None:
    labels = json.loads((CATALOG / "camvid_labels.json").read_text())["labels"]
    published.camvid_original(root, [label["color"] for label in labels])
    with pytest.raises(ValueError, match=r"prepare_dataset\.py camvid_original"):
        read_records("camvid_original_sem_seg_val")
    assert prepare("camvid_original").written == 3
    frames = {"train": "0001TP_006690", "val": "0016E5_07959", "test": "Seq05VD_f00000"}
    for split, frame in frames.items():
        (record,) = read_records(f"camvid_original_sem_seg_{split}")
        assert record["image_id"] == frame and (record["height"], record["width"]) == (2, 32)
    names = classes_of("camvid_original_sem_seg_val", mapped("camvid_original_sem_seg_val"))
    found = dict(zip([label["name"] for label in labels], names, strict=True))
    assert found["Void"] is None and found["SUVPickupTruck"] == "Car"
    assert found["Child"] == "Pedestrian" and found["LaneMkgsDriv"] == "Road"
    assert found["VegetationMisc"] == "Tree" and found["Sidewalk"] == "Pavement"
    for name in ("Sky", "Building", "Road", "Tree", "SignSymbol", "Fence", "Car", "Bicyclist"):
        assert found[name] == name


def test_an_unknown_colour_is_told(root) -> None:
    published.camvid_original(root, [(128, 128, 128), (1, 2, 3)])
    with pytest.raises(ValueError, match=r"_L\.png holds 1 colours .*#010203"):
        prepare("camvid_original")


def test_a_strange_frame_is_told(root) -> None:
    published.camvid_original(root, [(0, 0, 0)])
    folder = root / "camvid_original/LabeledApproved_full"
    (folder / "0001TP_006690_L.png").rename(folder / "0016E5_08000000_L.png")
    with pytest.raises(ValueError, match="0016E5_08000000.*CamVid"):
        prepare("camvid_original")


def test_camvid_splits_are_those_of_the_small_release(camvid) -> None:
    from contrast_d2.data.sources import camvid_split

    for split in ("train", "val", "test"):
        names = [record["image_id"] for record in read_records(f"camvid_sem_seg_{split}")]
        assert {camvid_split(name) for name in names} == {split}


def test_camvid_as_the_tutorial_lays_it_out(root) -> None:
    published.camvid_segnet(root)
    assert mapped("camvid_sem_seg_test") == [*range(11), 255]
    assert len(read_records("camvid_sem_seg_trainval")) == 2


# From the dataset's table: what each of its 36 labels is in tasks 1, 2 and 3.
CADIS = {
    1: [*range(7), *[7] * 29],
    2: [*range(7), 7, 7, 8, 7, 9, 10, 11, 12, 13, 14, 15, 13, 16, 7, 11, 8, 14, 12]
    + [255, 255, 7, 10, 255, 255, 255, 7, 9, 255, 255],
    3: [*range(25), *[255] * 11],
}


def test_cadis(root) -> None:
    published.cadis(root)
    for task, expected in CADIS.items():
        assert mapped(f"cadis_task{task}_sem_seg_test") == expected
    videos = {
        split: [
            int(record["image_id"][5:].partition("_")[0])
            for record in read_records(f"cadis_task2_sem_seg_{split}")
        ]
        for split in ("train", "val", "test")
    }
    assert videos["val"] == [5, 7, 16] and videos["test"] == [2, 12, 22]
    assert sorted(sum(videos.values(), [])) == list(range(1, 26))
    assert {split: len(found) for split, found in videos.items()} == {
        split: len(ids) for split, ids in CADIS_VIDEOS.items()
    }


def test_cadis_task_1_has_no_void(root) -> None:
    published.cadis(root)
    record = read_records("cadis_task1_sem_seg_val")[0]
    published.write_png(Path(record["sem_seg_file_name"]), published.one_row([255] * 36))
    with pytest.raises(ValueError, match=r"label values \[255\] that cadis_task1"):
        mapped("cadis_task1_sem_seg_val")


def test_order_does_not_depend_on_the_disk(root, monkeypatch) -> None:
    from detectron2.utils.file_io import PathManager

    published.cityscapes(root)
    prepare("cityscapes")
    before = read_records("cityscapes_fine_sem_seg_train")
    listed = PathManager.ls
    monkeypatch.setattr(PathManager, "ls", lambda path: sorted(listed(path))[::-1])
    assert read_records("cityscapes_fine_sem_seg_train") == before


def test_a_listed_image_that_is_missing_is_named(root) -> None:
    published.coco_stuff_10k(root)
    prepare("coco_stuff_10k")
    (root / "coco_stuff_10k/images/COCO_train2014_000000000078.jpg").unlink()
    with pytest.raises(ValueError, match="COCO_train2014_000000000078.jpg"):
        read_records("coco_stuff_10k_sem_seg_test")


def test_hidden_files_are_no_images(root) -> None:
    published.cadis(root)
    folder = root / "cadis/Video05/Images"
    (folder / "._Video5_frame000450.png").write_bytes(b"resource fork")
    assert len(read_records("cadis_task1_sem_seg_val")) == 3


def test_prepared_files_are_images_of_one_channel(root) -> None:
    from PIL import Image

    published.ade20k(root)
    prepare("ade20k")
    path = root / "ADEChallengeData2016/annotations_detectron2/training/ADE_train_00000001.png"
    with Image.open(path) as image:
        assert image.mode == "L"
        assert np.asarray(image)[0].tolist() == [255, *range(150)]
