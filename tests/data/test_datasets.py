import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from contrast_d2.data import DATASETS, LabelMap, SemSegMapper, load_labels, register_datasets
from contrast_d2.data.classes import distinct_colors

ROOT = Path(__file__).parents[2]

# Share of each class in the labelled pixels, in percent, and number of images that hold it, from
# the description of this release of CamVid.
TRAIN_PERCENT = [17.538, 24.215, 1.023, 32.960, 4.671, 10.124, 1.221, 1.173, 6.107, 0.666, 0.304]
TRAIN_IMAGES = [366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201]
TRAIN_VOID_PERCENT = 3.948


def test_import_registers_and_reads_no_disk(tmp_path):
    """Importing works without any data, and opens nothing in the datasets folder."""
    missing = tmp_path / "missing"
    code = f"""
import json, sys
opened = []
sys.addaudithook(
    lambda event, args: opened.append(str(args[0]))
    if event in ("open", "os.listdir", "os.scandir") and {str(missing)!r} in str(args[0])
    else None
)
import contrast_d2.data
from detectron2.data import DatasetCatalog, MetadataCatalog
names = [n for n in DatasetCatalog.list() if n.startswith(("camvid_sem", "shapes"))]
print(json.dumps([opened, {{n: MetadataCatalog.get(n).stuff_classes for n in names}}]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DETECTRON2_DATASETS": str(missing)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    opened, classes = json.loads(run.stdout.splitlines()[-1])
    assert opened == []
    assert set(classes) == {
        *(f"camvid_sem_seg_{split}" for split in ("train", "val", "test", "trainval")),
        *(f"shapes_sem_seg_{split}" for split in ("train", "val")),
    }
    assert len(classes["camvid_sem_seg_test"]) == 11
    assert len(classes["shapes_sem_seg_val"]) == 9


def test_registration_leaves_registered_names_alone(monkeypatch):
    name = DATASETS[0].name
    records = [{"file_name": "theirs"}]
    monkeypatch.setitem(DatasetCatalog.data, name, lambda: records)
    before = MetadataCatalog.get(name).as_dict()
    register_datasets()
    assert DatasetCatalog.get(name) is records
    assert MetadataCatalog.get(name).as_dict() == before


def test_rows_become_metadata(tiny_camvid):
    """A row whose label values are not contiguous: the general case of the table."""
    name = "rows_become_metadata"
    camvid = DATASETS[0]
    classes = camvid.classes._replace(
        names=("road", "car"), colors=((1, 2, 3), (4, 5, 6)), ids=((3,), (8,)), void_ids=(0, 255)
    )
    register_datasets([camvid._replace(name=name, classes=classes)])
    try:
        metadata = MetadataCatalog.get(name)
        assert metadata.stuff_dataset_id_to_contiguous_id == {3: 0, 8: 1}
        assert metadata.void_dataset_ids == (0, 255)
        assert metadata.stuff_colors == [[1, 2, 3], [4, 5, 6]]
        assert metadata.evaluator_type == "sem_seg"
        assert metadata.ignore_label == 255
        assert len(DatasetCatalog.get(name)) == 3
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


NUM_CLASSES = {
    "ade20k": 150,
    "cadis_task1": 8,
    "cadis_task2": 17,
    "cadis_task3": 25,
    "camvid": 11,
    "camvid_original": 11,
    "cityscapes_fine": 19,
    "coco_stuff_10k": 171,
    "coco_stuff_164k": 171,
    "pascal_context_59": 59,
    "pascal_context_60": 60,
    "shapes": 9,
}


def test_names_splits_and_numbers_of_classes():
    found = {}
    for row in DATASETS:
        dataset, _, split = row.name.partition("_sem_seg_")
        assert len(row.classes.names) == NUM_CLASSES[dataset]
        found.setdefault(dataset, set()).add(split)
    assert found.keys() == NUM_CLASSES.keys()
    three = {"train", "val", "test"}
    assert found["camvid"] == three | {"trainval"}
    assert found["cityscapes_fine"] == three | {"trainval", "test_images"}
    assert found["cadis_task3"] == found["camvid_original"] == three
    assert found["coco_stuff_10k"] == {"train", "test"}
    assert found["coco_stuff_164k"] == found["pascal_context_59"] == {"train", "val"}


def test_coco_stuff_names_are_detectron2s():
    """detectron2 names the 80 things, and the stuff that it does not merge, as COCO does."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    (row,) = (row for row in DATASETS if row.name == "coco_stuff_10k_sem_seg_test")
    names = {ids[0]: name for name, ids in zip(row.classes.names, row.classes.ids, strict=True)}
    theirs = {c["id"]: c["name"] for c in COCO_CATEGORIES if "merged" not in c["name"]}
    assert len(theirs) == 116
    assert {i: names[i] for i in theirs} == theirs
    assert list(names) == sorted(names) and list(names)[-1] == 182
    assert set(range(1, 183)) - set(names) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


def test_groups_of_cadis_and_cityscapes():
    groups = {row.name: row.classes.groups for row in DATASETS}
    task_2, task_3 = groups["cadis_task2_sem_seg_val"], groups["cadis_task3_sem_seg_val"]
    for found, classes in ((task_2, 17), (task_3, 25)):
        assert found["anatomies"] == (0, 4, 5, 6) and found["others"] == (1, 2, 3)
        assert found["tools"] == tuple(range(7, classes))
    assert task_2["rare"] == (9, 10, 12, 14, 16)
    assert task_3["rare"] == (11, 12, 14, 16, *range(18, 25))
    categories = groups["cityscapes_fine_sem_seg_val"]
    assert [len(c) for c in categories.values()] == [2, 3, 3, 2, 1, 2, 6]
    assert sorted(sum(categories.values(), ())) == list(range(19))


def test_detectron2s_entries_keep_their_meaning():
    """Names, void and contiguous label files are detectron2's; colours and label ids are added."""
    for name in ("cityscapes_fine_sem_seg_train", "ade20k_sem_seg_val"):
        assert DatasetCatalog[name].__module__ == "detectron2.data.datasets.builtin"
    cityscapes = MetadataCatalog.get("cityscapes_fine_sem_seg_val")
    assert cityscapes.evaluator_type == "cityscapes_sem_seg" and cityscapes.gt_dir
    assert cityscapes.stuff_colors[:2] == [[128, 64, 128], [244, 35, 232]]
    assert cityscapes.stuff_dataset_id_to_contiguous_id[33] == 18
    ade20k = MetadataCatalog.get("ade20k_sem_seg_train")
    assert ade20k.stuff_classes[0] == "wall" and len(ade20k.stuff_colors) == 150
    assert ade20k.stuff_dataset_id_to_contiguous_id[150] == 149
    for metadata, classes in ((cityscapes, 19), (ade20k, 150)):
        label_map = LabelMap.from_metadata(metadata)
        assert label_map.id_to_class == {i: i for i in range(classes)}
        assert label_map.void_ids == (255,)


def test_colours_without_a_palette_are_those_of_pascal_voc():
    assert distinct_colors(4) == ((128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert distinct_colors(8)[7] == (64, 0, 0)
    assert len(set(distinct_colors(255))) == 255


def test_table_is_consistent(subtests: pytest.Subtests) -> None:
    for row in DATASETS:
        with subtests.test(row=row):
            classes = row.classes
            assert (
                len(classes.names)
                == len(classes.colors)
                == len(classes.ids)
                == len(set(classes.colors))
            )
            assert LabelMap.from_metadata(MetadataCatalog.get(row.name)).num_classes == len(
                classes.names
            )


def test_records_are_sorted_and_read_at_load_time(tiny_camvid):
    records = DatasetCatalog.get("camvid_sem_seg_train")
    assert [record["image_id"] for record in records] == ["a", "b", "c"]
    assert records[1] == {
        "file_name": str(tiny_camvid / "images/train/b.png"),
        "sem_seg_file_name": str(tiny_camvid / "annotations/train/b.png"),
        "image_id": "b",
        "height": 6,
        "width": 8,
    }


def test_image_size_follows_exif_orientation(tiny_camvid):
    """detectron2 turns such an image upright, so that its record has to be upright, too."""
    (tiny_camvid / "images/train/b.png").unlink()
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (6, 8)).save(tiny_camvid / "images/train/b.jpg", exif=exif)
    record = DatasetCatalog.get("camvid_sem_seg_train")[1]
    assert (record["height"], record["width"]) == (6, 8)
    mapped = SemSegMapper(dataset_name="camvid_sem_seg_train", is_train=True)(record)
    assert mapped["image"].shape == (3, 6, 8)


def test_missing_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere/camvid/images/val") as error:
        DatasetCatalog.get("camvid_sem_seg_val")
    assert "DETECTRON2_DATASETS" in str(error.value)


def test_missing_label_folder_is_named(tiny_camvid):
    (tiny_camvid / "annotations/train").rename(tiny_camvid / "annotations/other")
    with pytest.raises(ValueError, match="camvid/annotations/train"):
        DatasetCatalog.get("camvid_sem_seg_train")


def test_empty_folder_is_named(tiny_camvid):
    for path in (tiny_camvid / "images/train").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="images/train .*DETECTRON2_DATASETS"):
        DatasetCatalog.get("camvid_sem_seg_train")


def test_image_without_label_is_named(tiny_camvid):
    (tiny_camvid / "annotations/train/b.png").unlink()
    with pytest.raises(ValueError, match=r"images/train/b\.png.*annotations/train/b"):
        DatasetCatalog.get("camvid_sem_seg_train")


def test_unreadable_image_header_is_named(tiny_camvid):
    (tiny_camvid / "images/train/c.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"Cannot read the image .*images/train/c\.png"):
        DatasetCatalog.get("camvid_sem_seg_train")


def test_camvid_counts(camvid, subtests: pytest.Subtests) -> None:
    for split, count in [("train", 367), ("val", 101), ("test", 233), ("trainval", 468)]:
        with subtests.test(split=split):
            records = DatasetCatalog.get(f"camvid_sem_seg_{split}")
            assert len({record["image_id"] for record in records}) == len(records) == count
            assert {(record["height"], record["width"]) for record in records} == {(360, 480)}


def test_camvid_class_shares(camvid):
    """The remapped labels of the training split have the published distribution."""
    label_map = LabelMap.from_metadata(MetadataCatalog.get("camvid_sem_seg_train"))
    pixels, images = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
    for record in DatasetCatalog.get("camvid_sem_seg_train"):
        counts = np.bincount(
            load_labels(record["sem_seg_file_name"], label_map).flat, minlength=256
        )
        pixels += counts
        images += counts > 0
    assert set(np.flatnonzero(pixels)) == {*range(11), 255}
    assert 100 * pixels[255] / pixels.sum() == pytest.approx(TRAIN_VOID_PERCENT, abs=5e-4)
    assert 100 * pixels[:11] / pixels[:11].sum() == pytest.approx(TRAIN_PERCENT, abs=6e-4)
    assert images[:11].tolist() == TRAIN_IMAGES


def test_camvid_names_match_the_release(camvid):
    lines = (camvid / "classes.txt").read_text().split("\n")[:11]
    assert MetadataCatalog.get("camvid_sem_seg_val").stuff_classes == lines


def test_documentation_lists_every_split_and_number():
    rows = re.findall(
        r"`(\w+_sem_seg_)` \| ([^|]*) \| (\d+) \| ([^|]*) \|",
        (ROOT / "docs/datasets.md").read_text(),
    )
    documented = {
        prefix + split: (int(classes), void)
        for prefix, splits, classes, void in rows
        for split in re.findall(r"[a-z_]+", splits)
    }
    assert documented.keys() == {row.name for row in DATASETS}
    for row in DATASETS:
        classes, void = documented[row.name]
        assert classes == len(row.classes.names)
        void_ids = LabelMap.from_metadata(MetadataCatalog.get(row.name)).void_ids
        first, _, last = void.partition(" to ")
        listed = range(int(first), int(last) + 1) if last else map(int, re.findall(r"\d+", void))
        assert set(listed) == set(void_ids)
