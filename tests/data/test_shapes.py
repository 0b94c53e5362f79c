import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager

from contrast_d2.data import LabelMap, load_labels
from contrast_d2.data.shapes import CLASS_NAMES, NUM_IMAGES, VOID_ID, render_scene


@pytest.fixture(scope="module")
def scenes():
    return [render_scene.__wrapped__("train", index) for index in range(NUM_IMAGES["train"])]


def test_records_open_through_detectron2():
    records = DatasetCatalog.get("shapes_sem_seg_train")
    assert len(records) == 256 and len(DatasetCatalog.get("shapes_sem_seg_val")) == 64
    record = records[17]
    assert record["file_name"] == "shapes://train/00017/image.png"
    image = read_image(record["file_name"], "RGB")
    assert image.shape == (record["height"], record["width"], 3) == (96, 128, 3)
    scene = render_scene("train", 17)
    assert np.array_equal(image, scene.image)
    label_map = LabelMap.from_metadata(MetadataCatalog.get("shapes_sem_seg_train"))
    assert np.array_equal(load_labels(record["sem_seg_file_name"], label_map), scene.label)


def test_files_are_the_same_in_every_process():
    path = "shapes://val/00005/image.png"
    code = f"""
import hashlib
import contrast_d2.data
from detectron2.utils.file_io import PathManager
print(hashlib.sha256(PathManager.open({path!r}, "rb").read()).hexdigest())
"""
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    render_scene.cache_clear()
    digest = hashlib.sha256(PathManager.open(path, "rb").read()).hexdigest()
    assert run.stdout.split()[-1] == digest


def test_scenes_differ(scenes):
    val = [render_scene.__wrapped__("val", index) for index in range(NUM_IMAGES["val"])]
    assert len({scene.image.tobytes() for scene in scenes + val}) == 256 + 64


def test_classes_have_a_long_tail(scenes):
    labels = np.stack([scene.label for scene in scenes])
    assert set(np.unique(labels)) == {*range(len(CLASS_NAMES)), VOID_ID}
    present = np.array([(labels == c).any(axis=(1, 2)).mean() for c in range(len(CLASS_NAMES))])
    pixels = np.array([(labels == c).mean() for c in range(len(CLASS_NAMES))])
    assert 0.6 < pixels[0] < 0.85
    # Each class is rarer than the one before, in pixels about geometrically.
    assert (np.diff(present) <= 0).all() and (np.diff(pixels) < 0).all()
    assert pixels[1] / pixels[-1] > 50
    assert 0.04 < present[-1] < 0.12 and 0 < pixels[-1] < 0.003
    assert np.mean(labels == VOID_ID) < 0.05


def test_every_class_can_be_evaluated():
    val = np.stack([render_scene.__wrapped__("val", i).label for i in range(NUM_IMAGES["val"])])
    assert set(np.unique(val)) == {*range(len(CLASS_NAMES)), VOID_ID}


def test_objects_are_outlined_by_void(scenes):
    """No pixel of an object touches the background, and thin objects keep their inside."""
    for scene in scenes[:50]:
        label = scene.label
        for one, other in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            objects, background = (one > 0) & (one != VOID_ID), other == 0
            assert not (objects & background).any()


def test_colour_alone_does_not_tell_the_class(scenes):
    """The nearest mean colour is right more often than by chance, but far from always."""
    objects = [(scene.label > 0) & (scene.label != VOID_ID) for scene in scenes]
    pixels = np.concatenate([s.image[o] for s, o in zip(scenes, objects, strict=True)])
    labels = np.concatenate([s.label[o] for s, o in zip(scenes, objects, strict=True)])
    classes = range(1, len(CLASS_NAMES))
    means = np.stack([pixels[labels == c].mean(axis=0) for c in classes])
    nearest = 1 + ((pixels[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    accuracy = np.mean([(nearest == labels)[labels == c].mean() for c in classes])
    assert 0.25 < accuracy < 0.6


def test_paths_that_do_not_exist():
    assert PathManager.isfile("shapes://val/00063/label.png")
    assert not PathManager.exists("shapes://val/00064/label.png")
    with pytest.raises(ValueError, match="val/64"):
        PathManager.open("shapes://val/00064/label.png", "rb")
    for path in ("test/00000/image.png", "train/00000/depth.png", "train/0/image.png"):
        assert not PathManager.exists(f"shapes://{path}")
        with pytest.raises(FileNotFoundError, match=path):
            PathManager.open(f"shapes://{path}", "rb")
    with pytest.raises(ValueError, match="mode 'rb'"):
        PathManager.open("shapes://val/00000/label.png", "wb")
