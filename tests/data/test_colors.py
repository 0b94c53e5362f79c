"""Changes of colour: those of torchvision, and the hue's exact shift."""

import colorsys

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as tvf

from contrast_d2.data import ColorJitter
from contrast_d2.data.colors import shift_hue


def exactly_shifted(image, shift):
    """Hue, saturation and value in float64, back to 0..255 without rounding."""
    result = np.empty(image.shape)
    for place in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255.0))
        result[place] = np.multiply(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value), 255)
    return result


@pytest.fixture
def image():
    """Random colours, and the pure and grey ones at which the sectors of the hue meet."""
    colors = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    corners = np.array(np.meshgrid(*[[0, 255, 90]] * 3)).reshape(3, -1).T
    colors[0, : len(corners)] = corners
    return colors


def test_hue_is_shifted_exactly_up_to_rounding(image, subtests: pytest.Subtests) -> None:
    for shift in [0.0, 0.05, -0.05, 0.0123, 1 / 12, -1 / 12, 1 / 6, -1 / 6, 0.2, -0.35, 0.5, -0.5]:
        with subtests.test(shift=shift):
            error = abs(shift_hue(image, shift) - exactly_shifted(image, shift))
            assert error.max() < 1
            assert error.mean() < 0.3


def test_hue_is_nearer_to_the_exact_one_than_pillows(image):
    """The reason not to take torchvision's: it costs more and rounds hues to 256 steps."""
    exact = exactly_shifted(image, 0.05)
    theirs = abs(np.asarray(tvf.adjust_hue(Image.fromarray(image), 0.05)) - exact)
    ours = abs(shift_hue(image, 0.05) - exact)
    assert theirs.max() > 5 > 5 * ours.max()
    # Both are the same change of colour, in the same direction.
    assert theirs.mean() < 2 < abs(image - exact).mean()


def test_blocks_of_rows_leave_no_seam():
    """Images of more pixels than a block, and views as flips hand them over."""
    image = np.random.default_rng(0).integers(0, 256, (300, 700, 3), dtype=np.uint8)
    shifted = shift_hue(image, 0.04)
    assert np.array_equal(shift_hue(image[:, ::-1], 0.04), shifted[:, ::-1])
    rows = [shift_hue(image[i : i + 1], 0.04) for i in range(300)]
    assert np.array_equal(np.concatenate(rows), shifted)


def blended(image, grey, factor):
    """Without rounding; torchvision rounds down."""
    return np.clip(grey + factor * (image.astype(float) - grey), 0, 255)


def test_each_change_is_the_exact_one_up_to_rounding(image, subtests: pytest.Subtests) -> None:
    """And torchvision's, with factors beyond the usual ones as well."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    still = dict(brightness=(1, 1), contrast=(1, 1), saturation=(1, 1), hue=0.0)
    for name, middle in [("brightness", 0), ("contrast", round(grey.mean())), ("saturation", grey)]:
        for factor in [2 / 3, 0.1, 0.99, 1.0, 1.2, 1.5, 1.6, 3.7]:
            with subtests.test(name=name, factor=factor):
                jitter = ColorJitter(**still | {name: (factor, factor)})
                found = jitter.get_transform(image).apply_image(image).astype(int)
                middle_HW1 = np.expand_dims(middle, -1) if np.ndim(middle) else middle
                # Half a level for the factor's 8 bits, one for rounding down, and the grey's own.
                error = abs(found - blended(image, middle_HW1, factor))
                assert error.max() <= 1.51 + abs(factor - 1) * (name == "saturation")
                theirs = getattr(tvf, f"adjust_{name}")(Image.fromarray(image), factor)
                assert abs(found - np.asarray(theirs)).mean() < 0.5


def test_changes_come_in_torchvisions_order(image, subtests: pytest.Subtests) -> None:
    for seed in range(6):
        with subtests.test(seed=seed):
            np.random.seed(seed)
            found = ColorJitter(hue=0.0).get_transform(image).apply_image(image)
            np.random.seed(seed)
            factors = [np.random.uniform(2 / 3, 1.5) for _ in range(3)]
            np.random.uniform(0, 0)
            expected = Image.fromarray(image)
            adjust = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation]
            for i in np.random.permutation(4):
                if i < 3:
                    expected = adjust[i](expected, factors[i])
            difference = abs(found.astype(int) - np.asarray(expected))
            assert difference.max() <= 4
            assert difference.mean() < 0.4


def test_planes_lie_one_after_the_other(image):
    """So that the network's input is a copy of memory, whatever the view that comes in."""
    jitter = ColorJitter().get_transform(image)
    found = jitter.apply_image(image[:, ::-1])
    assert found.transpose(2, 0, 1).flags.c_contiguous
    assert np.array_equal(found, jitter.apply_image(np.ascontiguousarray(image[:, ::-1])))
