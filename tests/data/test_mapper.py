import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from PIL import Image

from contrast_d2.data import SemSegMapper, train_augmentations


def mapper(**arguments):
    return SemSegMapper(**{"dataset_name": "camvid_sem_seg_train", "is_train": True, **arguments})


@pytest.fixture
def record(tiny_camvid):
    return DatasetCatalog.get("camvid_sem_seg_train")[0]


def test_training_sample(record):
    before = copy.deepcopy(record)
    sample = mapper()(record)
    assert record == before
    assert {k: sample[k] for k in before} == before
    assert sample["image"].dtype == torch.uint8
    expected = np.asarray(Image.open(record["file_name"])).transpose(2, 0, 1)
    assert np.array_equal(sample["image"].numpy(), expected)
    stored = np.asarray(Image.open(record["sem_seg_file_name"])).astype(np.int64)
    assert (stored == 11).any()
    assert sample["sem_seg"].dtype == torch.uint8  # what workers send, an eighth of int64
    assert np.array_equal(sample["sem_seg"].numpy(), np.where(stored == 11, 255, stored))


def test_bgr_is_the_reversed_sample(record):
    """Augmentations see RGB in both cases, so that only the order of the channels differs."""
    images = []
    for image_format in ("RGB", "BGR"):
        np.random.seed(0)
        augmentations = train_augmentations((6, 6))
        images.append(mapper(augmentations=augmentations, image_format=image_format)(record))
    assert torch.equal(images[0]["image"].flip(0), images[1]["image"])
    assert not torch.equal(images[0]["image"], images[1]["image"])


def test_samples_from_kept_images_are_the_same(record, tmp_path, monkeypatch):
    """And are tensors of their own: what trains on them may write into them."""
    samples = []
    for cache_dir in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        np.random.seed(0)
        mapped = mapper(cache_dir=cache_dir, augmentations=train_augmentations((6, 6)))(record)
        samples.append(mapped["image"].clone())
        mapped["image"].zero_()
        if cache_dir is not None:  # from now on decoding would fail
            monkeypatch.setattr("contrast_d2.data.mapper.read_rgb", None)
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
    whole = mapper(cache_dir=str(tmp_path / "cache"))(record)["image"]
    assert whole.any()


def test_test_sample_needs_no_labels(record):
    """Sizes are the stored image's, whatever the augmentations: predictions return to them."""
    del record["sem_seg_file_name"], record["height"], record["width"]
    sample = mapper(is_train=False, augmentations=[T.Resize((12, 16))])(record)
    assert "sem_seg" not in sample
    assert sample["image"].shape == (3, 12, 16)
    assert (sample["height"], sample["width"]) == (6, 8)


def test_real_image(camvid):
    record = DatasetCatalog.get("camvid_sem_seg_val")[7]
    sample = mapper(augmentations=train_augmentations((300, 500)))(record)
    assert sample["image"].shape == (3, 300, 500) and sample["sem_seg"].shape == (300, 500)
    assert set(sample["sem_seg"].unique().tolist()) <= {*range(11), 255}
    assert (sample["height"], sample["width"]) == (360, 480)


def test_training_without_labels_is_an_error(record):
    del record["sem_seg_file_name"]
    with pytest.raises(ValueError, match=r"a\.png has no 'sem_seg_file_name'"):
        mapper()(record)


def test_size_mismatch_names_both_files(record):
    Image.new("L", (8, 5)).save(record["sem_seg_file_name"])
    with pytest.raises(ValueError) as error:
        mapper()(record)
    for part in (record["file_name"], record["sem_seg_file_name"], "(6, 8)", "(5, 8)"):
        assert part in str(error.value)


def test_size_unlike_the_record_is_an_error(record):
    record["width"] = 9
    with pytest.raises(ValueError, match=r"a\.png has size .*\(6, 8\).*\(6, 9\)"):
        mapper(is_train=False)(record)


def test_undefined_label_names_file_and_values(record):
    Image.fromarray(np.full((6, 8), 14, dtype=np.uint8)).save(record["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"annotations/train/a\.png: 48 of 48 .*\[14\].*camvid"):
        mapper()(record)


def test_truncated_image_is_named(camvid, record, tmp_path):
    whole = next((camvid / "images/val").iterdir()).read_bytes()
    record["file_name"] = str(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Cannot read the image .*cut\.jpg"):
        mapper()(record)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="'camvid_sem_seg_trian' is not .*camvid_sem_seg_train"):
        mapper(dataset_name="camvid_sem_seg_trian")
    with pytest.raises(ValueError, match="image_format.*'YUV'"):
        mapper(image_format="YUV")
