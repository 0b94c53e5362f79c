"""Fast decoders: the same pixels and errors as Pillow's, whatever the file."""

import io
import struct
import zlib

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo

from contrast_d2.data import LabelMap, load_labels, reading
from contrast_d2.data.check.facts import read_pair
from contrast_d2.data.files import add_sizes

RNG = np.random.default_rng(0)
# Smooth enough for JPEG, of odd sides for its blocks.
RGB = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((61, 45))
TURNED = Image.Exif()
TURNED[0x0112] = 6
IDENTITY = LabelMap({i: i for i in range(40)})


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, contents):
    checksum = zlib.crc32(kind + contents)
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", checksum)


def turned_behind_the_pixels():
    """PNG allows EXIF data behind the pixels, where opening the file does not find them."""
    whole = saved(RGB, "PNG")
    return whole[:-12] + chunk(b"eXIf", TURNED.tobytes()[6:]) + whole[-12:]


def with_text(keyword, text):
    info = PngInfo()
    info.add_text(keyword, text)
    return saved(RGB, "PNG", pnginfo=info)


def turned_by_imagemagick():
    """Its way before PNG had a chunk for EXIF data: hexadecimal text."""
    exif = TURNED.tobytes()
    return with_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n")


FILES = {
    "rgb.png": lambda: saved(RGB, "PNG"),
    "named_color_transparent.png": lambda: saved(RGB, "PNG", transparency=(1, 2, 3)),
    "alpha.png": lambda: saved(RGB.convert("RGBA"), "PNG"),
    "grey.png": lambda: saved(RGB.convert("L"), "PNG"),
    "palette.png": lambda: saved(RGB.convert("P"), "PNG"),
    "bits.png": lambda: saved(RGB.convert("1"), "PNG"),
    "deep.png": lambda: saved(Image.fromarray(np.arange(600, dtype=np.uint16)[None]), "PNG"),
    "comment.png": lambda: with_text("Software", "a program"),
    "turned.png": lambda: saved(RGB, "PNG", exif=TURNED),
    "turned_late.png": turned_behind_the_pixels,
    "turned_by_imagemagick.png": turned_by_imagemagick,
    "444.jpg": lambda: saved(RGB, "JPEG", quality=90, subsampling=0),
    "420.jpg": lambda: saved(RGB, "JPEG", quality=60, subsampling=2),
    "progressive.jpg": lambda: saved(RGB, "JPEG", progressive=True),
    "grey.jpg": lambda: saved(RGB.convert("L"), "JPEG"),
    "cmyk.jpg": lambda: saved(RGB.convert("CMYK"), "JPEG"),
    "turned.jpg": lambda: saved(RGB, "JPEG", exif=TURNED),
    "other.bmp": lambda: saved(RGB, "BMP"),
}


@pytest.fixture(params=["with kornia-rs", "without"])
def decoders(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(reading, "kornia_io", None)
    else:
        pytest.importorskip("kornia_rs", reason="the extra `fast`")


def test_pixels_are_detectron2s(decoders, tmp_path, subtests: pytest.Subtests) -> None:
    for name in list(FILES):
        with subtests.test(name=name):
            path = tmp_path / name
            path.write_bytes(FILES[name]())
            found = reading.read_rgb(str(path))
            assert found.dtype == np.uint8
            if name != "deep.png":  # which that clips
                assert np.array_equal(found, read_image(str(path), "RGB"))
            if name.startswith("turned"):
                assert found.shape == (61, 45, 3)


def test_images_of_16_bits_are_scaled(tmp_path, subtests: pytest.Subtests) -> None:
    deep = np.array([[0, 257, 300, 32768, 65535]], dtype=np.uint16)
    for kind in ("png", "tiff"):
        with subtests.test(kind=kind):
            path = tmp_path / f"deep.{kind}"
            Image.fromarray(deep).save(path)
            found = reading.read_rgb(str(path))
            assert found.dtype == np.uint8 and found.shape == (1, 5, 3)
            assert found[0].tolist() == [[v] * 3 for v in (0, 1, 1, 128, 255)]
    for dtype in (np.float32, np.int32):
        with subtests.test(dtype=dtype):
            Image.fromarray(deep.astype(dtype)).save(tmp_path / "wide.tiff")
            with pytest.raises(ValueError, match="wide.tiff.*32 bits.*8 or 16"):
                reading.read_rgb(str(tmp_path / "wide.tiff"))


def test_a_file_of_another_format_starts_no_program(
    tmp_path, monkeypatch, subtests: pytest.Subtests
) -> None:
    """Pillow has Ghostscript draw what begins as EPS does, whatever the file is called."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    for name, read in (
        ("image", reading.read_rgb),
        ("labels", lambda file: load_labels(file, IDENTITY)),
        ("size", lambda file: add_sizes([{"file_name": file}])),
    ):
        with subtests.test(name), pytest.raises(ValueError, match="Cannot read.*a.png"):
            read(str(path))
    assert read_pair("", {"file_name": str(path)}, {}).image.error


def test_kornia_rs_is_asked_for_what_it_decodes_alike(subtests: pytest.Subtests) -> None:
    pytest.importorskip("kornia_rs", reason="the extra `fast`")
    for name, channels, fast in [
        ("rgb.png", 3, True),
        ("comment.png", 3, True),
        ("grey.png", 1, True),
        ("grey.png", 3, False),
        ("rgb.png", 1, False),
        ("palette.png", 1, False),  # indices, which a decoder for pictures replaces by colours
        ("alpha.png", 3, False),
        ("bits.png", 1, False),
        ("deep.png", 1, False),
        ("444.jpg", 3, False),
    ]:
        with subtests.test(name=name, channels=channels):
            pixels = reading.decode_png(FILES[name](), channels)
            assert (pixels is not None) == fast
            if fast:
                assert pixels.shape == ((45, 61, 3) if channels == 3 else (45, 61))


def test_kornia_rs_is_asked_for_upright_jpegs(
    tmp_path, monkeypatch, subtests: pytest.Subtests
) -> None:
    kornia_io = pytest.importorskip("kornia_rs", reason="the extra `fast`").io
    black = np.zeros((45, 61, 3), dtype=np.uint8)
    monkeypatch.setattr(kornia_io, "decode_image_jpegturbo", lambda data, mode: black)
    for name, asked in [("420.jpg", True), ("cmyk.jpg", False), ("turned.jpg", False)]:
        with subtests.test(name=name):
            (tmp_path / name).write_bytes(FILES[name]())
            assert (reading.read_rgb(str(tmp_path / name)).max() == 0) == asked


def test_files_that_end_too_early_are_named(decoders, tmp_path, subtests: pytest.Subtests) -> None:
    for name in ["rgb.png", "420.jpg"]:
        for size in [20, 500]:
            with subtests.test(name=name, size=size):
                path = tmp_path / name
                path.write_bytes(FILES[name]()[:size])
                with pytest.raises(ValueError, match=rf"Cannot read the image .*{name}"):
                    reading.read_rgb(str(path))


def test_damaged_files_are_what_they_are_to_pillow(
    decoders, tmp_path, subtests: pytest.Subtests
) -> None:
    """Some damage is beyond reading, some changes a few pixels or none; no decoder may differ."""
    for name in ["rgb.png", "420.jpg"]:
        with subtests.test(name=name):
            whole = FILES[name]()
            path = tmp_path / name
            outcomes = set()
            for position in range(3, len(whole), len(whole) // 60):
                path.write_bytes(
                    whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
                )
                try:
                    expected = read_image(str(path), "RGB")
                except reading.READ_ERRORS:
                    outcomes.add("unreadable")
                    with pytest.raises(ValueError, match=rf"Cannot read the image .*{name}"):
                        reading.read_rgb(str(path))
                else:
                    outcomes.add("readable")
                    assert np.array_equal(reading.read_rgb(str(path)), expected)
            assert outcomes == {"unreadable", "readable"}


def test_labels_that_end_too_early_are_named(decoders, tmp_path):
    whole = saved(Image.fromarray(RNG.integers(0, 40, (60, 70), dtype=np.uint8)), "PNG")
    (tmp_path / "label.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"Cannot read the label image .*label\.png"):
        load_labels(str(tmp_path / "label.png"), IDENTITY)


def test_pillows_limit_of_the_size_holds(
    decoders, tmp_path, monkeypatch, subtests: pytest.Subtests
) -> None:
    """A small file can pretend to hold any number of pixels, which would fill the memory."""
    for name in ["rgb.png", "420.jpg"]:
        with subtests.test(name=name):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 61 * 45 // 2 - 1)
            (tmp_path / name).write_bytes(FILES[name]())
            with pytest.raises(ValueError, match=rf"Cannot read the image .*{name}.*bomb"):
                reading.read_rgb(str(tmp_path / name))


def test_a_head_that_lies_about_the_size_is_not_believed(tmp_path):
    whole = bytearray(FILES["rgb.png"]())
    whole[16:24] = struct.pack(">II", 30_000, 30_000)
    assert reading.decode_png(bytes(whole), channels=3) is None


def test_labels_are_as_stored(decoders, tmp_path, subtests: pytest.Subtests) -> None:
    for options in [{}, {"transparency": 3}]:
        with subtests.test(options=options):
            stored = RNG.integers(0, 40, (60, 70), dtype=np.uint8)
            Image.fromarray(stored).save(tmp_path / "label.png", **options)
            labels = load_labels(str(tmp_path / "label.png"), IDENTITY)
            assert np.array_equal(labels, stored)
            labels[0, 0] = 0  # callers may write into them
