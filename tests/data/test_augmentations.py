import numpy as np
import pytest
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from omegaconf import OmegaConf

from contrast_d2.data import (
    ColorJitter,
    RandomGaussianBlur,
    RandomPad,
    RandomScale,
    RandomScaledCrop,
    ReflectPad,
    full_frame_augmentations,
    train_augmentations,
)


def apply(augmentations, image, labels):
    sample = T.AugInput(image, sem_seg=labels)
    T.AugmentationList(augmentations)(sample)
    return sample.image, sample.sem_seg


def encoded(labels):
    """An image whose red channel tells the label."""
    image = np.zeros((*labels.shape, 3), dtype=np.uint8)
    image[..., 0] = 20 * labels + 10
    return image


def test_scale_and_aspect_ranges():
    np.random.seed(0)
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    augmentation = RandomScale((0.5, 2.0), (0.9, 1.1))
    sizes = np.array(
        [(t.new_h, t.new_w) for t in (augmentation.get_transform(image) for _ in range(500))]
    )
    height_factor, width_factor = sizes[:, 0] / 200, sizes[:, 1] / 300
    scale, aspect = np.sqrt(height_factor * width_factor), width_factor / height_factor
    for values, low, high in ((scale, 0.5, 2.0), (aspect, 0.9, 1.1)):
        assert values.min() > low - 0.01 and values.max() < high + 0.01
        # Uniform: mean and spread of the draw, not only its ends.
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.1)
    # The change of the aspect ratio keeps the area, so both are independent.
    assert abs(np.corrcoef(scale, aspect)[0, 1]) < 0.15


def test_without_aspect_the_ratio_is_kept():
    np.random.seed(0)
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    augmentation = RandomScale((0.5, 2.0))
    for _ in range(20):
        transform = augmentation.get_transform(image)
        assert transform.new_w / transform.new_h == pytest.approx(1.5, rel=0.01)


def test_padding_fills_image_and_label_at_every_offset():
    np.random.seed(0)
    image = np.full((4, 6, 3), 200, dtype=np.uint8)
    labels = np.full((4, 6), 3, dtype=np.uint8)
    offsets = set()
    for _ in range(200):
        padded, padded_labels = apply([RandomPad((6, 7), 17, 254)], image, labels)
        assert padded.shape == (6, 7, 3) and padded_labels.shape == (6, 7)
        inside = padded_labels == 3
        assert inside.sum() == 24 and (padded[inside] == 200).all()
        assert (padded[~inside] == 17).all() and (padded_labels[~inside] == 254).all()
        offsets.add(tuple(np.argwhere(inside)[0]))
    assert offsets == {(y, x) for y in range(3) for x in range(2)}


def test_large_images_are_not_padded():
    labels = np.arange(80, dtype=np.uint8).reshape(8, 10)
    image, unchanged = apply([RandomPad((8, 5))], encoded(labels % 12), labels)
    assert unchanged is labels and image.shape == (8, 10, 3)


def test_crop_limits_the_largest_class():
    """Nine tenths of the scene are one class: crops must prefer the corner that is not."""
    labels = np.zeros((100, 100), dtype=np.uint8)
    labels[60:, 60:] = np.arange(40)[None] // 8 + 1
    labels[:, :50] = 255  # a large ignored area that must not count
    image = encoded(np.minimum(labels, 6))

    def largest_share(max_class_area):
        crop = train_augmentations(
            (40, 40), scale=(1, 1), aspect=None, max_class_area=max_class_area, jitter=False
        )
        shares = []
        for _ in range(100):
            counts = np.bincount(apply(crop, image, labels)[1].flat, minlength=256)[:255]
            shares.append(counts.max() / counts.sum() if counts.sum() else 1.0)
        return np.array(shares)

    np.random.seed(0)
    free, limited = largest_share(1.0), largest_share(0.75)
    assert (free > 0.75).mean() > 0.5
    assert (limited > 0.75).mean() < 0.1


def test_small_images_keep_their_pixels():
    """Whatever the crop, an image smaller than it is kept whole and its surroundings ignored."""
    np.random.seed(0)
    labels = np.tile(np.arange(12, dtype=np.uint8), (12, 1))
    crop = train_augmentations((20, 30), scale=(1, 1), aspect=None, flip=0.0, jitter=False)
    for _ in range(10):
        image, cropped = apply(crop, encoded(labels), labels)
        assert cropped.shape == (20, 30)
        assert np.bincount(cropped.flat, minlength=256)[:12].tolist() == [12] * 12
        assert (image[cropped == 255] == 0).all()


def test_image_and_labels_stay_aligned():
    """Real sizes and all geometric steps: the image's colour still tells the label."""
    np.random.seed(0)
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 11, (5, 6)), np.ones((40, 40))).astype(np.uint8)
    image = encoded(labels)
    flipped = 0
    for _ in range(20):
        seen, cropped = apply(train_augmentations((160, 200), jitter=False), image, labels)
        assert seen.shape == (160, 200, 3) and cropped.shape == (160, 200)
        valid = cropped != 255
        assert valid.mean() > 0.1
        assert (seen[~valid] == 0).all()
        # Only pixels beside an edge, where bilinear values mix, may differ.
        wrong = abs(seen[valid][:, 0].astype(int) - (20 * cropped[valid].astype(int) + 10)) > 9
        assert wrong.mean() < 0.08
        reversed_labels = cropped[:, ::-1][valid]
        flipped += (reversed_labels != cropped[valid]).any()
    assert flipped == 20  # the scenes are not symmetric: a flip of one of both would show


def test_flip_probability():
    labels = np.zeros((4, 4), dtype=np.uint8)
    labels[:, 0] = 1
    np.random.seed(0)
    for probability, expected in ((0.0, 0), (1.0, 50)):
        augmentations = train_augmentations(
            (4, 4), scale=(1, 1), aspect=None, flip=probability, jitter=False
        )
        flips = [apply(augmentations, encoded(labels), labels)[1][0, 3] for _ in range(50)]
        assert sum(flips) == expected


def test_jitter_changes_colours_only():
    np.random.seed(0)
    record = DatasetCatalog.get("shapes_sem_seg_train")[3]
    image = read_image(record["file_name"], "RGB")
    labels = np.arange(96 * 128, dtype=np.uint32).reshape(96, 128).astype(np.uint8)
    jittered, same = apply([ColorJitter()], image, labels)
    assert same is labels and jittered.dtype == np.uint8 and jittered.shape == image.shape
    assert abs(jittered.astype(int) - image).mean() > 2
    grey_before, grey_after = image.mean(axis=2).ravel(), jittered.mean(axis=2).ravel()
    assert np.corrcoef(grey_before, grey_after)[0, 1] > 0.9


def test_jitter_draws_each_factor_from_its_range():
    """A grey image has no hue, so that brightness alone scales its mean."""
    np.random.seed(0)
    grey = np.full((4, 4, 3), 100, dtype=np.uint8)
    augmentation = ColorJitter(brightness=(0.8, 1.2), contrast=(1, 1), saturation=(1, 1), hue=0)
    means = [augmentation.get_transform(grey).apply_image(grey).mean() for _ in range(100)]
    assert 79 <= min(means) < 85 and 115 < max(means) <= 120
    red = grey * np.array([2, 0, 0], dtype=np.uint8)
    augmentation = ColorJitter(brightness=(1, 1), contrast=(1, 1), saturation=(1, 1), hue=0.05)
    shifted = np.stack([augmentation.get_transform(red).apply_image(red)[0, 0] for _ in range(100)])
    assert (shifted[:, 0] == 200).all()
    # A shift of the hue of red by 0.05 of the circle raises green or blue by 0.3 of the value.
    assert 50 < shifted[:, 1].max() <= 61 and 50 < shifted[:, 2].max() <= 61


def test_numpy_seed_fixes_everything():
    record = DatasetCatalog.get("shapes_sem_seg_train")[0]
    image = read_image(record["file_name"], "RGB")
    labels = read_image(record["sem_seg_file_name"], "L")[..., 0]
    results = []
    for _ in range(2):
        np.random.seed(5)
        results.append(apply(train_augmentations((64, 64)), image, labels))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
    other = apply(train_augmentations((64, 64)), image, labels)
    assert not np.array_equal(results[0][0], other[0])


def test_lazy_config_builds_them():
    """A config hands over omegaconf lists, not tuples."""
    config = OmegaConf.create({"crop": [32, 48]})
    config.augmentations = LazyCall(train_augmentations)(
        crop_size="${crop}", scale=(1.0, 1.0), aspect=None
    )
    augmentations = instantiate(config.augmentations)
    labels = np.zeros((40, 60), dtype=np.uint8)
    assert apply(augmentations, encoded(labels), labels)[1].shape == (32, 48)


def test_arguments_are_checked(subtests: pytest.Subtests) -> None:
    for arguments, message in [
        ({"crop_size": (0, 4)}, r"crop_size.*\(0, 4\)"),
        ({"crop_size": (4,)}, "crop_size"),
        ({"crop_size": (4.5, 4)}, "crop_size"),
        ({"scale": (2.0, 0.5)}, r"scale.*\(2\.0, 0\.5\)"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"aspect": (1.1, 0.9)}, "aspect"),
        ({"max_class_area": 0.0}, "max_class_area.*got 0.0"),
        ({"max_class_area": 75}, "max_class_area.*got 75"),
        ({"flip": 1.5}, "flip.*got 1.5"),
        ({"pad_value": 256}, "pad_value.*got 256"),
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(ValueError, match=message):
                train_augmentations(**{"crop_size": (4, 4), **arguments})


def test_jitter_arguments_are_checked():
    with pytest.raises(ValueError, match="hue.*got 0.7"):
        ColorJitter(hue=0.7)
    with pytest.raises(ValueError, match="contrast"):
        ColorJitter(contrast=(1.5, 0.5))


def test_reflected_edges_repeat_neither_pixels_nor_void():
    labels = np.arange(5 * 3, dtype=np.uint8).reshape(5, 3)
    padded, padded_labels = apply([ReflectPad(4)], encoded(labels), labels)
    assert padded_labels.shape == (8, 4)
    assert padded_labels[:, 0].tolist() == [3, 0, 3, 6, 9, 12, 9, 6]  # one row above, two below
    assert padded_labels[1].tolist() == [0, 1, 2, 1]
    assert np.array_equal(padded, encoded(padded_labels))


def test_frames_of_cadis_get_two_rows_above_and_below():
    image, labels = np.zeros((540, 960, 3), np.uint8), np.zeros((540, 960), np.uint8)
    labels[0], labels[2], labels[-3] = 1, 2, 3
    _, padded = apply(full_frame_augmentations(flip=0), image, labels)
    assert padded.shape == (544, 960)
    assert (padded[0] == 2).all() and (padded[2] == 1).all() and (padded[-1] == 3).all()
    fitting = ReflectPad(32).get_transform(padded)
    assert fitting.apply_image(padded) is padded


def test_reflection_moves_points_with_the_pixels():
    transform = ReflectPad(8).get_transform(np.zeros((4, 2, 3), np.uint8))
    assert transform.apply_coords(np.array([[0.0, 0.0]])).tolist() == [[3.0, 2.0]]


def test_blur_has_its_share_and_leaves_labels_alone():
    np.random.seed(0)
    image = np.zeros((41, 41, 3), dtype=np.uint8)
    image[20, 20] = 255
    labels = np.eye(41, dtype=np.uint8)
    blurred = 0
    for _ in range(400):
        result, result_labels = apply([RandomGaussianBlur(0.2, (1.0, 2.0))], image, labels)
        assert np.array_equal(result_labels, labels)
        if result[20, 20, 0] < 255:
            blurred += 1
            # The peak of a Gaussian is 1 / (2 pi sigma^2): 41 and 10 of 255 at the ends.
            assert 8 <= result[20, 20, 0] <= 45
    assert 55 <= blurred <= 105


def test_short_side_comes_before_the_random_scale():
    image, labels = np.zeros((100, 300, 3), np.uint8), np.zeros((100, 300), np.uint8)
    augmentations = train_augmentations((50, 50), short_side=50, scale=(1, 1), aspect=None)
    resized, _ = apply(augmentations[:1], image, labels)
    assert resized.shape == (50, 150, 3)
    assert isinstance(augmentations[1], RandomScaledCrop)


def test_arguments_outside_their_range(subtests: pytest.Subtests) -> None:
    for make, message in [
        (lambda: ReflectPad(0), "multiple must be a positive integer, got 0"),
        (lambda: RandomGaussianBlur(1.5, (1, 2)), "probability .* 0..1, got 1.5"),
        (lambda: RandomGaussianBlur(0.5, (2, 1)), "radius must be a range"),
        (lambda: full_frame_augmentations(flip=-1), "flip is a probability"),
        (lambda: train_augmentations((8, 8), short_side=0), "short_side must be .* got 0"),
    ]:
        with subtests.test(make=make):
            with pytest.raises(ValueError, match=message):
                make()
