from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import contrast_d2.data  # noqa: F401  (registers the datasets)
from contrast_d2.evaluation import SemSegEvaluator, SubmissionWriter

NAME = "cityscapes_fine_sem_seg_test_images"
SIZE = (6, 10)


@pytest.fixture
def cityscapes_test(tmp_path: Path, monkeypatch) -> list[dict]:
    """Three images of two cities, without labels."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for stem in ("berlin_000000_000019", "berlin_000001_000019", "bonn_000000_000019"):
        folder = tmp_path / "cityscapes/leftImg8bit/test" / stem.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(folder / f"{stem}_leftImg8bit.png")
    return DatasetCatalog.get(NAME)


def scores_of(classes_HW: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes_HW, num_classes).permute(2, 0, 1).float()


def test_cityscapes_gets_its_label_ids_in_a_zip(cityscapes_test, tmp_path):
    writer = SubmissionWriter(NAME, str(tmp_path / "out"))
    predicted = [(torch.arange(60).view(SIZE) + i) % 19 for i in range(3)]
    for record, classes in zip(cityscapes_test, predicted, strict=True):
        writer.process([record], [{"sem_seg": scores_of(classes, 19)}])
    assert writer.evaluate() == {}

    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    with zipfile.ZipFile(tmp_path / "out/submission.zip") as archive:
        assert sorted(archive.namelist()) == [
            "berlin_000000_000019_leftImg8bit.png",
            "berlin_000001_000019_leftImg8bit.png",
            "bonn_000000_000019_leftImg8bit.png",
        ]
        for record, classes in zip(cityscapes_test, predicted, strict=True):
            with archive.open(Path(record["file_name"]).name) as file, Image.open(file) as png:
                assert png.mode == "L"
                np.testing.assert_array_equal(np.asarray(png), np.array(ids)[classes])


def test_scores_that_are_not_finite_are_not_packed(cityscapes_test, tmp_path):
    writer = SubmissionWriter(NAME, str(tmp_path / "out"))
    for record in cityscapes_test:
        writer.process([record], [{"sem_seg": torch.full((19, *SIZE), torch.nan)}])
    with pytest.raises(FloatingPointError, match="berlin_000000_000019.*3 of 3 images"):
        writer.evaluate()
    assert not (tmp_path / "out/submission.zip").exists()


@pytest.mark.parametrize(
    ("name", "first_id"), [("ade20k_sem_seg_val", 1), ("coco_stuff_164k_sem_seg_val", 0)]
)
def test_others_get_the_values_of_their_label_files(monkeypatch, tmp_path, name, first_id):
    image = tmp_path / "ADE_val_00000001.jpg"
    Image.new("RGB", SIZE[::-1]).save(image)
    # Listed without the dataset's files on disk.
    monkeypatch.setitem(DatasetCatalog.data, name, lambda: [{"file_name": str(image)}])
    num_classes = len(MetadataCatalog.get(name).stuff_classes)
    classes = torch.arange(60).view(SIZE) % num_classes
    writer = SubmissionWriter(name, str(tmp_path))
    writer.process([{"file_name": str(image)}], [{"sem_seg": scores_of(classes, num_classes)}])
    writer.evaluate()
    written = np.asarray(Image.open(tmp_path / "submission/ADE_val_00000001.png"))
    dataset_id = MetadataCatalog.get(name).stuff_dataset_id_to_contiguous_id
    assert written[0, 0] == first_id
    assert [dataset_id[v] for v in written.ravel().tolist()] == classes.ravel().tolist()


def test_missing_images_and_wrong_files_are_found(cityscapes_test, tmp_path):
    writer = SubmissionWriter(NAME, str(tmp_path))
    outputs = [{"sem_seg": torch.randn(19, *SIZE)} for _ in cityscapes_test]
    writer.process(cityscapes_test[:2], outputs[:2])
    with pytest.raises(ValueError, match=r"1 of 3 images .*bonn_000000_000019"):
        writer.evaluate()
    assert not (tmp_path / "submission.zip").exists()
    writer.process(cityscapes_test[2:], outputs[2:])
    path = tmp_path / "submission/bonn_000000_000019_leftImg8bit.png"
    good = path.read_bytes()
    for content, message in (
        (np.full(SIZE, 7), None),
        (np.full(SIZE, 9), r"bonn.* holds \[9\]"),
        (np.full((6, 9), 7), r"bonn.* is \(6, 9\) .*\(6, 10\)"),
    ):
        Image.fromarray(content.astype(np.uint8)).save(path)
        if message is None:
            writer.evaluate()
            continue
        with pytest.raises(ValueError, match=message):
            writer.evaluate()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="Cannot read back .*bonn"):
        writer.evaluate()
    writer.reset()
    with pytest.raises(ValueError, match="3 of 3 images"):
        writer.evaluate()


def test_errors_of_use(cityscapes_test, make_dataset, tmp_path):
    writer = SubmissionWriter(NAME, str(tmp_path))
    with pytest.raises(ValueError, match="elsewhere.png is not an image"):
        writer.process([{"file_name": "elsewhere.png"}], [{"sem_seg": torch.zeros(19, 2, 2)}])
    with pytest.raises(ValueError, match=r"\(11, 6, 10\).*\(19, H, W\)"):
        writer.process(cityscapes_test[:1], [{"sem_seg": torch.zeros(11, *SIZE)}])
    with pytest.raises(ValueError, match="stuff_dataset_id_to_contiguous_id"):
        SubmissionWriter(make_dataset([np.zeros((2, 2))], ("a",)), str(tmp_path))
    with pytest.raises(ValueError, match="no labels for .*SubmissionWriter"):
        SemSegEvaluator(NAME)
