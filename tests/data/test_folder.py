"""Folders with a dataset.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from contrast_d2.data import SemSegMapper, num_classes, register_folder
from contrast_d2.data.datasets import check_registered
from contrast_d2.data.folder import load_folder_split

from . import published

DATA = Path(__file__).parents[2] / "configs/common/data"
TRAIN, VAL = "street_sem_seg_train", "street_sem_seg_val"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder `street` in DETECTRON2_DATASETS; label values 0, 1 and 255."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    path = tmp_path / "street"
    for split, names in (("train", "ab"), ("val", "c")):
        for name in names:
            labels = published.one_row([0, 1, 255])
            published.write_image(path / f"images/{split}/{name}.jpg", labels)
            published.write_png(path / f"annotations/{split}/{name}.png", labels)
    describe(path, classes=["road", "car"])
    yield path
    for name in [n for n in DatasetCatalog.list() if n.startswith(("street", "mine"))]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def describe(folder: Path, **entries) -> None:
    (folder / "dataset.json").write_text(json.dumps(entries))


def labels_of(name: str) -> list[int]:
    sample = SemSegMapper(dataset_name=name, is_train=True)(DatasetCatalog.get(name)[0])
    return sample["sem_seg"][0].tolist()


def test_a_folder_is_found_by_name(folder) -> None:
    check_registered(VAL)
    assert labels_of(VAL) == [0, 1, 255]
    metadata = MetadataCatalog.get(VAL)
    assert metadata.stuff_classes == ["road", "car"]
    assert len({tuple(color) for color in metadata.stuff_colors}) == 2
    assert metadata.ignore_label == 255
    records = DatasetCatalog.get(TRAIN)
    assert [record["image_id"] for record in records] == ["a", "b"]
    assert (records[0]["height"], records[0]["width"]) == (2, 3)


def test_the_config_follows_the_command_line(folder) -> None:
    cfg = LazyConfig.load(str(DATA / "folder.py"))
    cfg.train = {"seed": 0, "output_dir": "unused", "accumulation_steps": 1}
    cfg = LazyConfig.apply_overrides(
        cfg,
        [
            f"dataset.train={TRAIN}",
            f"dataset.test={VAL}",
            "dataloader.train.num_workers=0",
            "dataloader.train.total_batch_size=2",
        ],
    )
    assert cfg.dataset.num_classes == 2
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert [tuple(sample["image"].shape) for sample in batch] == [(3, 512, 512)] * 2
    cfg.dataset.train = ["cadis_task3_sem_seg_train", "cadis_task3_sem_seg_val"]
    assert cfg.dataset.num_classes == 25


def test_number_of_classes_of_an_unknown_dataset() -> None:
    with pytest.raises(ValueError, match="'camvid_sem_seg_trian'.*camvid_sem_seg_"):
        num_classes("camvid_sem_seg_trian")
    with pytest.raises(ValueError, match="'camvit_sem_seg_val'.*camvid_sem_seg_val"):
        num_classes("camvit_sem_seg_val")


def test_full_description(folder) -> None:
    (folder / "val.txt").write_text("b\n")
    (folder / "masks").mkdir()
    for name in "ab":
        source = folder / f"annotations/train/{name}.png"
        published.write_png(source, published.one_row([40, 7, 8, 0]))
        source.rename(folder / f"masks/{name}_mask.png")
        published.write_image(folder / f"images/train/{name}.jpg", published.one_row([0] * 4))
    split = {"images": "images/train", "annotations": "masks", "label_suffix": "_mask.png"}
    describe(
        folder,
        classes=[{"name": "car", "ids": [7, 8], "color": [1, 2, 3]}, {"name": "sky", "ids": [40]}],
        void_ids=[0],
        groups={"vehicles": ["car"]},
        splits={"all": split, "half": {**split, "names": "val.txt"}},
    )
    names = register_folder(str(folder), "mine")
    assert names == ["mine_sem_seg_all", "mine_sem_seg_half"]
    assert labels_of("mine_sem_seg_all") == [1, 0, 0, 255]
    metadata = MetadataCatalog.get("mine_sem_seg_half")
    assert metadata.stuff_colors[0] == [1, 2, 3]
    assert metadata.class_groups == {"vehicles": (0,)}
    assert [record["image_id"] for record in DatasetCatalog.get("mine_sem_seg_half")] == ["b"]
    assert register_folder(str(folder), "mine") == names  # again, to no effect


def test_an_unknown_split_names_those_that_exist(folder) -> None:
    with pytest.raises(ValueError, match=f"'street_sem_seg_valid' is not .*{VAL}"):
        check_registered("street_sem_seg_valid")


def test_a_folder_without_description_is_named(folder) -> None:
    (folder / "dataset.json").unlink()
    with pytest.raises(ValueError, match="put a dataset.json into .*/street"):
        check_registered(TRAIN)
    with pytest.raises(ValueError, match=r"street/dataset\.json"):
        register_folder(str(folder))


def test_wrong_descriptions_are_told(folder, subtests: pytest.Subtests) -> None:
    for entries, message in [
        ({}, "'classes'"),
        ({"classes": []}, "'classes'"),
        ({"classes": ["a", "a"]}, r"\['a'\]"),
        ({"classes": [7]}, "name.*7"),
        ({"classes": [{"name": "a", "colour": [0, 0, 0]}]}, r"'a' has unknown .*\['colour'\]"),
        ({"classes": [{"name": "a", "color": [0, 0, 256]}]}, "color of 'a' must be .*256"),
        ({"classes": [{"name": "a", "ids": []}]}, "'a'"),
        ({"classes": [{"name": "a", "ids": [70000]}]}, "'a' must be .* 0..65535"),
        ({"classes": [{"name": "a", "ids": [True]}]}, "'a'.*integers"),
        ({"classes": ["a", {"name": "b", "ids": [0]}]}, "0 is both 'a' and 'b'"),
        ({"classes": ["a"], "void_ids": [0]}, "0 is both 'void' and 'a'"),
        ({"classes": ["a"], "groups": {"g": ["b"]}}, "'g'.*names"),
        ({"classes": ["a"], "clases": []}, r"unknown entries \['clases'\]"),
        ({"classes": ["a"], "splits": {}}, "split"),
        ({"classes": ["a"], "splits": {"x": {"image": "i"}}}, r"'x' has unknown .*\['image'\]"),
        ({"classes": ["a"], "splits": {"x": ["i"]}}, "'x'.*strings"),
    ]:
        with subtests.test(entries=entries):
            describe(folder, **entries)
            with pytest.raises(ValueError, match=rf"street/dataset\.json.*{message}"):
                register_folder(str(folder))


def test_malformed_json_is_told(folder) -> None:
    (folder / "dataset.json").write_text('{"classes": ["road",]}')
    with pytest.raises(ValueError, match=r"Cannot read .*dataset\.json: .*line 1"):
        register_folder(str(folder))
    (folder / "dataset.json").write_text('["road"]')
    with pytest.raises(ValueError, match=r"dataset\.json must hold a JSON object"):
        register_folder(str(folder))


def test_missing_files_are_named(folder) -> None:
    register_folder(str(folder))
    (folder / "annotations/train/b.png").unlink()
    with pytest.raises(ValueError, match=r"images/train/b\.jpg.*annotations/train/b"):
        DatasetCatalog.get(TRAIN)
    (folder / "annotations/val").rename(folder / "annotations/other")
    with pytest.raises(ValueError, match=r"annotations/val.*dataset\.json") as error:
        DatasetCatalog.get(VAL)
    assert "DETECTRON2_DATASETS" not in str(error.value)
    (folder / "images").rename(folder / "pictures")
    with pytest.raises(ValueError, match="put images into images/SPLIT"):
        DatasetCatalog.get(VAL)


def test_two_images_of_one_name_are_told(folder) -> None:
    published.write_image(folder / "images/train/a.png", published.one_row([0] * 3))
    register_folder(str(folder))
    with pytest.raises(ValueError, match=r"both a\.jpg and a\.png, which have one label"):
        DatasetCatalog.get(TRAIN)


@pytest.mark.parametrize(
    ("text", "message"), [("", "lists no image"), ("a\nb\na\n", "twice, as a")]
)
def test_wrong_split_files_are_told(folder, text, message) -> None:
    (folder / "train.txt").write_text(text)
    describe(folder, classes=["a", "b"], splits={"train": {"names": "train.txt"}})
    register_folder(str(folder))
    with pytest.raises(ValueError, match=rf"street/train\.txt {message}|{message}"):
        DatasetCatalog.get(TRAIN)


def test_suffixes_of_any_case_and_folders_below_are_found(tmp_path: Path) -> None:
    names = ("a.JPG", "b.TIF", "drive 1/c.Png", "drive 1/v1.0/d.webp", "._e.jpg")
    for name in names:
        image = tmp_path / "images/train" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(image)
        label = (tmp_path / "annotations/train" / name).with_suffix(".PNG")
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 4)).save(label)
    (tmp_path / "dataset.json").write_text('{"classes": ["a"]}')
    records = load_folder_split(str(tmp_path), "train")
    assert [record["image_id"] for record in records] == ["a", "b", "drive 1/c", "drive 1/v1.0/d"]
    for record in records:
        assert (record["height"], record["width"]) == (4, 6)
        assert Path(record["sem_seg_file_name"]).suffix == ".PNG"


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"classes": ["a"]}')
    folder = tmp_path / "images/train/below"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="no images.*it is empty"):
        load_folder_split(str(tmp_path), "train")
    for name in ("a.npy", "b.npy", "c.jp2", "README"):
        (folder / name).touch()
    with pytest.raises(ValueError, match=r"\.npy \(2\), no ending \(1\), \.jp2 \(1\)"):
        load_folder_split(str(tmp_path), "train")


def test_labels_inside_the_folder_of_images_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "all/labels").mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(tmp_path / "all/a.png")
    Image.new("L", (6, 4)).save(tmp_path / "all/labels/a.png")
    (tmp_path / "dataset.json").write_text(
        '{"classes": ["a"], "splits": {"train": {"images": "all", "annotations": "all/labels"}}}'
    )
    (record,) = load_folder_split(str(tmp_path), "train")
    assert record["image_id"] == "a"
