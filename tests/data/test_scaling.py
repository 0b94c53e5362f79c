"""Scale, pad and crop in one step: the same draws and pixels as in three."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from PIL import Image

from contrast_d2.data import RandomPad, RandomScale, RandomScaledCrop, scaling
from contrast_d2.data.scaling import ScaledCropTransform

SCALE, ASPECT = (0.5, 2.0), (0.9, 1.1)


def in_three_steps(crop_size, scale=SCALE, aspect=ASPECT, max_class_area=0.75, pad_value=7):
    return [
        RandomScale(scale, aspect),
        RandomPad(crop_size, pad_value, 255),
        T.RandomCrop_CategoryAreaConstraint(
            "absolute",
            crop_size,
            single_category_max_area=max_class_area,
            ignored_category=255,
        ),
    ]


def in_one_step(crop_size, scale=SCALE, aspect=ASPECT, max_class_area=0.75, pad_value=7):
    return [RandomScaledCrop(crop_size, scale, aspect, max_class_area, pad_value)]


def apply(augmentations, image, labels, seed):
    """Image, labels, and a random number that tells how many were drawn before it."""
    np.random.seed(seed)
    sample = T.AugInput(image, sem_seg=labels)
    T.AugmentationList(augmentations)(sample)
    return sample.image, sample.sem_seg, np.random.rand()


def noise(height, width):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 12, (height, width), dtype=np.uint8)


def assert_same(image, labels, seeds, share, **arguments):
    """Every draw gives the same labels and, but for the rounding of few pixels, image."""
    shares = []
    for seed in range(seeds):
        expected = apply(in_three_steps(**arguments), image, labels, seed)
        found = apply(in_one_step(**arguments), image, labels, seed)
        assert np.array_equal(found[1], expected[1])
        assert found[2] == expected[2]
        difference = abs(found[0].astype(int) - expected[0])
        assert difference.max() <= 2
        shares.append((difference > 0).mean())
    assert np.mean(shares) < share


def test_each_draw_is_that_of_three_steps(subtests: pytest.Subtests) -> None:
    for size, crop_size in [
        ((37, 53), (40, 30)),  # padded in one direction, cropped in the other
        ((97, 31), (64, 64)),
        ((5, 7), (9, 9)),
        ((150, 200), (50, 60)),
        ((120, 160), (120, 160)),
    ]:
        for max_class_area in [1.0, 0.75, 0.1]:
            with subtests.test(size=size, crop_size=crop_size, max_class_area=max_class_area):
                assert_same(
                    *noise(*size), 40, share=0.1, crop_size=crop_size, max_class_area=max_class_area
                )


def test_each_draw_is_that_of_three_steps_on_a_real_image(camvid):
    record = DatasetCatalog.get("camvid_sem_seg_train")[5]
    image = read_image(record["file_name"], "RGB")
    labels = read_image(record["sem_seg_file_name"], "L")[..., 0]
    # Road and building make the constraint bite at this share.
    assert_same(image, labels, 12, share=0.01, crop_size=(200, 300), max_class_area=0.4)
    # The smallest scale averages over eight pixels.
    assert_same(image, labels, 4, share=0.01, crop_size=(60, 60), scale=(0.125, 0.2), aspect=None)


def test_nearest_pixels_are_pillows(subtests: pytest.Subtests) -> None:
    """Every pixel of the map has another value, so that each misplaced one shows."""
    for new in [(3, 200), (50, 64), (64, 50), (127, 129), (1, 1)]:
        with subtests.test(new=new):
            labels = np.arange(50 * 64, dtype=np.int32).reshape(50, 64)
            found = ScaledCropTransform((50, 64), new, (0, 0), new).apply_segmentation(labels)
            expected = Image.fromarray(labels).resize(new[::-1], Image.NEAREST)
            assert found.dtype == np.int32
            assert np.array_equal(found, np.asarray(expected))


def test_only_what_the_window_needs_is_resized(monkeypatch):
    """Not twice as many pixels, of which a few lead to one that can be resized by itself."""
    sizes = []
    part = scaling._part

    def spy(*axis):
        found = part(*axis)
        sizes.append((found[0].stop - found[0].start, found[2]))
        return found

    monkeypatch.setattr(scaling, "_part", spy)
    image = np.zeros((1000, 2000, 3), dtype=np.uint8)
    window = ScaledCropTransform((1000, 2000), (2000, 4000), (700, 900), (100, 200))
    assert window.apply_image(image).shape == (100, 200, 3)
    assert sizes == [(52, 102), (102, 202)]
    window = ScaledCropTransform((1000, 2000), (1379, 2711), (700, 900), (400, 600))
    window.apply_image(image)
    assert all(
        resized < 1.5 * wanted for (_, resized), wanted in zip(sizes[2:], (400, 600), strict=True)
    )


def test_parts_that_keep_their_size_are_filtered():
    """A part as long as what it becomes is still another one: pixels lie between the old ones."""
    image = noise(150, 60)[0]
    window = ScaledCropTransform((150, 60), (153, 60), (71, 0), (50, 60))
    expected = T.ResizeTransform(150, 60, 153, 60).apply_image(image)[71:121]
    assert scaling._part(71, 121, 150, 153)[0] == slice(50, 120)  # 70 pixels for 20 + 50
    assert abs(window.apply_image(image).astype(int) - expected).max() <= 2


def test_any_part_of_an_axis_is_that_of_the_whole():
    """Every window of every size of a line of noise."""
    line = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 23, 1), dtype=np.uint8), 3, 2)
    for new in range(1, 70):
        whole = T.ResizeTransform(1, 23, 1, new).apply_image(line).astype(int)
        for first in range(new):
            for last in {first + 1, (first + new + 1) // 2, new}:
                if last > first:
                    window = ScaledCropTransform((1, 23), (1, new), (0, first), (1, last - first))
                    assert abs(window.apply_image(line) - whole[:, first:last]).max() <= 1


def test_counts_are_of_all_labels():
    labels = noise(5, 7)[1]
    labels[0, :3] = 255
    for size in [(5, 7), (1, 1), (1, 3), (2, 2), (4, 7)]:
        part = labels[: size[0], : size[1]]
        expected = np.bincount(part.ravel(), minlength=256)
        expected[255] = 0
        assert np.array_equal(RandomScaledCrop((4, 4))._counts(part), expected)


def test_points_move_with_the_pixels():
    """Against detectron2's resize and crop, and with the padding as an offset."""
    points = np.array([[0.0, 0.0], [12.5, 7.0], [63.0, 49.0]])
    window = ScaledCropTransform((50, 64), (100, 32), (30, 4), (20, 20))
    resized = T.ResizeTransform(50, 64, 100, 32).apply_coords(points.copy())
    assert np.allclose(window.apply_coords(points.copy()), resized - [4, 30])
    padded = ScaledCropTransform((50, 64), (50, 64), (-6, -3), (60, 70))
    assert np.allclose(padded.apply_coords(points.copy()), points + [3, 6])


def test_crops_without_limit_need_no_labels():
    image, labels = noise(40, 50)
    crop = in_one_step((20, 30), max_class_area=1.0)
    with_labels, without = (apply(crop, image, seg, seed=3) for seg in (labels, None))
    assert np.array_equal(with_labels[0], without[0]) and without[1] is None
    with pytest.raises(ValueError, match=r"max_class_area 0\.5 and class_crop 0\.0.*labels"):
        apply(in_one_step((20, 30), max_class_area=0.5), image, None, seed=3)
    with pytest.raises(ValueError, match=r"class_crop 0\.1 need labels"):
        apply([RandomScaledCrop((20, 30), class_crop=0.1)], image, None, seed=3)


def class_crops(labels, number, **arguments):
    """The labels of crops of (20, 30)."""
    image = np.zeros((*labels.shape, 3), dtype=np.uint8)
    crop = RandomScaledCrop((20, 30), **arguments)
    return [apply([crop], image, labels, seed)[1] for seed in range(number)]


def test_a_class_crop_lies_over_a_pixel_of_a_class(subtests: pytest.Subtests) -> None:
    """Of three classes, two of which have one pixel each: at a corner and in the middle."""
    for size in [(100, 150), (12, 150), (12, 18)]:
        for scale in [(1.0, 1.0), (1.0, 2.0)]:
            with subtests.test(size=size, scale=scale):
                labels = np.zeros(size, dtype=np.uint8)
                labels[:3] = 255
                labels[-1, -1], labels[size[0] // 2, size[1] // 3] = 1, 2
                crops = class_crops(labels, 300, scale=scale, class_crop=1.0)
                shares = [np.mean([(crop == c).any() for crop in crops]) for c in (1, 2)]
                # Each class is drawn in a third of the crops, and is also met by chance.
                assert min(shares) > 0.25
                places = [np.argwhere(crop == 2)[0] for crop in crops if (crop == 2).any()]
                if size == (100, 150):
                    assert max(shares) < 0.45
                    # It may lie anywhere in the crop.
                    assert (np.ptp(places, axis=0) >= (17, 26)).all()


def test_class_crops_are_as_frequent_as_told():
    labels = np.zeros((400, 600), dtype=np.uint8)
    labels[200, 300] = 1
    crops = class_crops(labels, 600, scale=(1.0, 1.0), class_crop=0.4)
    # Half of the class crops draw the rare class; by chance it is in 0.3 % of the crops.
    assert np.mean([(crop == 1).any() for crop in crops]) == pytest.approx(0.2, abs=0.05)


def test_class_crops_are_mixed_and_of_labelled_pixels():
    labels = np.zeros((100, 150), dtype=np.uint8)
    labels[40:60, 60:90] = 1
    crops = class_crops(labels, 40, scale=(1.0, 1.0), class_crop=1.0, max_class_area=0.9)
    shares = [np.bincount(crop.ravel(), minlength=2).max() / crop.size for crop in crops]
    assert np.mean(np.array(shares) < 0.9) > 0.9
    void = np.full((100, 150), 255, dtype=np.uint8)
    assert all((crop == 255).all() for crop in class_crops(void, 3, class_crop=1.0))


def test_other_images_are_refused():
    window = ScaledCropTransform((50, 64), (100, 128), (0, 0), (20, 20))
    with pytest.raises(ValueError, match=r"\(50, 64\).*\(64, 50\)"):
        window.apply_image(np.zeros((64, 50, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"\(50, 64\).*\(64, 50\)"):
        window.apply_segmentation(np.zeros((64, 50), dtype=np.uint8))
    with pytest.raises(ValueError, match="float32"):
        window.apply_image(np.zeros((50, 64, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"\(50, 64, 4\)"):
        window.apply_image(np.zeros((50, 64, 4), dtype=np.uint8))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"max_class_area.*got 1\.5"):
        RandomScaledCrop((4, 4), max_class_area=1.5)
    with pytest.raises(ValueError, match=r"class_crop.*got -0\.1"):
        RandomScaledCrop((4, 4), class_crop=-0.1)
    with pytest.raises(ValueError, match=r"scale.*\(0, 1\)"):
        RandomScaledCrop((4, 4), scale=(0, 1))
    with pytest.raises(ValueError, match=r"crop_size.*\(4, 0\)"):
        RandomScaledCrop((4, 0))
