import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from PIL import Image

from contrast_d2.data import LabelMap, load_labels

CAMVID = MetadataCatalog.get("camvid_sem_seg_train")


@pytest.fixture
def label_map():
    """Values 7, 8 and 33 are the classes, 0 and 300 are void."""
    return LabelMap({7: 0, 8: 1, 33: 2}, void_ids=(0, 300), dataset_name="toy")


def test_values_become_contiguous(label_map, subtests: pytest.Subtests) -> None:
    for dtype in [np.uint8, np.uint16, np.int32, np.int64]:
        with subtests.test(dtype=dtype):
            mapped = label_map.apply(np.array([[7, 33], [0, 8]], dtype=dtype), "x.png")
            assert mapped.dtype == np.uint8
            assert mapped.tolist() == [[0, 2], [255, 1]]


@pytest.mark.parametrize("num_classes", [3, 254, 255])
def test_8_bit_labels_take_a_way_of_their_own_to_the_same_classes(num_classes):
    """255 classes and the ignored label leave no value that could stand for illegal ones."""
    ids = {i: (i * 2) % num_classes if num_classes % 2 else i for i in range(num_classes)}
    label_map = LabelMap(ids, void_ids=(255,), ignore_label=255)
    labels = np.random.default_rng(0).choice([*ids, 255], (40, 30)).astype(np.uint8)
    for view in (labels, labels[:, ::-1], labels.T):
        expected = label_map.apply(view.astype(np.int32), "x.png")
        assert np.array_equal(label_map.apply(view, "x.png"), expected)
    if num_classes == 3:
        labels[1, 2] = 77
        with pytest.raises(ValueError, match=r"1 of 1200 pixels hold label values \[77\]"):
            label_map.apply(labels, "x.png")


def test_undefined_values_are_reported(label_map):
    labels = np.array([[7, 9, 9], [255, 300, 8]], dtype=np.uint16)
    with pytest.raises(ValueError) as error:
        label_map.apply(labels, "some/label.png")
    message = str(error.value)
    assert all(x in message for x in ("some/label.png", "3 of 6", "[9, 255]"))
    assert "toy" in message
    assert "classes are 7-8, 33" in message
    assert "0, 300" in message


@pytest.mark.parametrize("value", [-1, 2**16, 2**31 - 1])
def test_values_beyond_16_bits_are_undefined(label_map, value):
    """-1 must not wrap around to the end of the lookup table."""
    with pytest.raises(ValueError, match=rf"1 of 2 pixels hold label values \[{value}\]"):
        label_map.apply(np.array([[7, value]], dtype=np.int64), "x.png")


def test_only_integer_maps_are_accepted(label_map):
    with pytest.raises(ValueError, match=r"x\.png.*\(H, W\).*float64"):
        label_map.apply(np.zeros((2, 2)), "x.png")
    with pytest.raises(ValueError, match=r"x\.png.*\(2, 2, 3\)"):
        label_map.apply(np.zeros((2, 2, 3), dtype=np.uint8), "x.png")


def test_camvid_void_is_ignored_and_255_is_an_error():
    label_map = LabelMap.from_metadata(CAMVID)
    ids = np.arange(12, dtype=np.uint8)[None]
    assert label_map.apply(ids, "x.png").tolist() == [[*range(11), 255]]
    with pytest.raises(ValueError, match=r"\[12, 255\].*0-10.* 11"):
        label_map.apply(np.array([[3, 12, 255]], dtype=np.uint8), "x.png")


def test_plain_detectron2_metadata():
    """Without void_dataset_ids the files hold contiguous ids, whatever the ids of the dataset."""
    metadata = Metadata(name="theirs", stuff_classes=["a", "b", "c"], ignore_label=254)
    metadata.stuff_dataset_id_to_contiguous_id = {92: 0, 93: 1, 95: 2}
    label_map = LabelMap.from_metadata(metadata)
    assert label_map.num_classes == 3
    assert label_map.apply(np.array([[0, 1, 2, 254]]), "x").tolist() == [[0, 1, 2, 254]]
    with pytest.raises(ValueError, match=r"\[3, 255\] that theirs does not define"):
        label_map.apply(np.array([[3, 255]]), "x")


def test_metadata_errors_name_dataset_and_key():
    with pytest.raises(ValueError, match="'theirs' has no metadata 'stuff_classes'"):
        LabelMap.from_metadata(Metadata(name="theirs", ignore_label=255))
    with pytest.raises(ValueError, match="'theirs' has no metadata 'ignore_label'"):
        LabelMap.from_metadata(Metadata(name="theirs", stuff_classes=["a"]))
    metadata = Metadata(name="theirs", stuff_classes=["a", "b"], ignore_label=255)
    metadata.set(stuff_dataset_id_to_contiguous_id={5: 0}, void_dataset_ids=())
    with pytest.raises(ValueError, match="'theirs' names 2 classes but maps .* to 1"):
        LabelMap.from_metadata(metadata)


def test_contradictions_are_rejected(subtests: pytest.Subtests) -> None:
    for arguments, message in [
        (({0: 0, 1: 2},), r"must be 0\.\.K-1.*\[0, 2\]"),
        (({0: 0, 1: 1}, (1,)), r"\[1\] of this dataset are a class and void"),
        (({0: 0, 1: 1}, (), 1), "ignore_label.*got 1"),
        (({0: 0, 1: 1}, (), 65535), "ignore_label.*got 65535"),
        (({0: 0, 70000: 1},), r"got \[70000\]"),
        (({i: i for i in range(256)},), "K <= 255"),
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(ValueError, match=message):
                LabelMap(*arguments)


def test_palette_images_are_indices(label_map, tmp_path):
    """Reading a palette image as grey levels would return the brightness of its colours."""
    image = Image.fromarray(np.array([[7, 8], [33, 0]], dtype=np.uint8))
    image.putpalette([(index * 37) % 256 for index in range(768)])
    image.save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as reread:
        assert reread.mode == "P"
    labels = load_labels(str(tmp_path / "palette.png"), label_map)
    assert labels.tolist() == [[0, 1], [2, 255]]


def test_16_bit_images(label_map, tmp_path):
    Image.fromarray(np.array([[7, 300]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert load_labels(str(tmp_path / "deep.png"), label_map).tolist() == [[0, 255]]


def test_1_bit_images(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "binary.png")
    label_map = LabelMap({0: 0, 1: 1})
    assert load_labels(str(tmp_path / "binary.png"), label_map).tolist() == [[1, 0]]


def test_colour_images_are_rejected(label_map, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour\.png.*one channel.*'RGB'"):
        load_labels(str(tmp_path / "colour.png"), label_map)


def test_unreadable_files_are_named(camvid, label_map, tmp_path):
    whole = next((camvid / "annotations/val").iterdir()).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Cannot read the label image .*cut\.png"):
        load_labels(str(tmp_path / "cut.png"), label_map)
    with pytest.raises(ValueError, match=r"Cannot read the label image .*missing\.png"):
        load_labels(str(tmp_path / "missing.png"), label_map)
