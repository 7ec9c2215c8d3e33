"""Any image to RGB: every mode against its definition, and every way an image can be broken."""

from __future__ import annotations

import hashlib
import io
import threading

import numpy as np
import pytest
from PIL import Image, ImageFile

from bitquake.noise import ImageError, load_rgb, pixel_hash


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def test_rgb_is_taken_as_it_is(rgb: np.ndarray) -> None:
    assert np.array_equal(load_rgb(rgb), rgb)
    assert np.array_equal(load_rgb(Image.fromarray(rgb)), rgb)
    assert np.array_equal(load_rgb(encoded(Image.fromarray(rgb), "PNG")), rgb)
    turned = load_rgb(rgb.transpose(1, 0, 2))
    assert np.array_equal(turned, rgb.transpose(1, 0, 2)) and turned.flags.c_contiguous


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_convert_as_pillow_does(mode: str, rgb: np.ndarray) -> None:
    image = Image.fromarray(rgb).convert(mode)
    assert np.array_equal(load_rgb(image), np.asarray(image.convert("RGB")))


def test_grey_arrays_repeat_over_the_channels(rgb: np.ndarray) -> None:
    grey = rgb[:, :, 0]
    for image in (grey, grey[:, :, None], Image.fromarray(grey)):
        assert np.array_equal(load_rgb(image), np.stack([grey] * 3, axis=2))


def test_transparency_is_composited_on_white(rgb: np.ndarray) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (6, 9, 1), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    rgba = np.concatenate([rgb, alpha], axis=2)
    weight = alpha / 255
    expected = rgb * weight + 255 * (1 - weight)
    for image in (rgba, Image.fromarray(rgba), encoded(Image.fromarray(rgba), "PNG")):
        got = load_rgb(image)
        assert np.abs(got - expected).max() <= 0.5 + 1e-9
        assert (got[0] == 255).all() and np.array_equal(got[1], rgb[1])


def test_grey_with_alpha_and_transparent_palette_entries() -> None:
    grey = Image.new("LA", (2, 1), (100, 0))
    assert (load_rgb(grey) == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    reopened = encoded(palette, "PNG", transparency=0)
    assert load_rgb(reopened)[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_sixteen_bit_grey_is_scaled_not_cut() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(int)
    for image in (values, Image.fromarray(values), encoded(Image.fromarray(values), "PNG")):
        assert load_rgb(image)[0, :, 1].tolist() == expected[0].tolist()
    wide = Image.fromarray(np.array([[-5, 0, 65535, 1_000_000]], dtype=np.int32))
    assert load_rgb(wide)[0, :, 0].tolist() == [0, 0, 255, 255]


def test_float_grey_is_clipped_and_nan_is_black() -> None:
    values = np.array([[-1.0, 0.4, 99.6, 300.0, np.nan, np.inf]], dtype=np.float32)
    assert load_rgb(Image.fromarray(values))[0, :, 2].tolist() == [0, 0, 100, 255, 0, 255]


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90), (2, lambda a: a[:, ::-1])],
)
def test_exif_orientation_is_applied(orientation: int, turn, rgb: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(rgb), "PNG", exif=exif)
    assert np.array_equal(load_rgb(data), turn(rgb))


def test_damaged_exif_does_not_cost_the_picture(rgb: np.ndarray) -> None:
    data = encoded(Image.fromarray(rgb), "PNG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xffjunk")
    assert np.array_equal(load_rgb(data), rgb)


BROKEN = {
    "none": (None, "None"),
    "no bytes": (b"", "0 bytes"),
    "text": (b"<html>404 not found</html>", "no image"),
    "path": ("photo.jpg", "got str"),
    "dict": ({"bytes": b""}, "got dict"),
    "empty array": (np.zeros((0, 4, 3), np.uint8), "empty"),
    "empty PIL": (Image.new("RGB", (0, 4)), "empty"),
    "floats": (np.zeros((4, 4, 3)), "float64"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), "channels last"),
    "flat": (np.zeros(12, np.uint8), "uint8"),
}


@pytest.mark.parametrize("image, message", BROKEN.values(), ids=BROKEN)
def test_broken_images_say_what_is_wrong(image: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_rgb(image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_anywhere_loads_fully_or_raises_image_error(kind: str) -> None:
    full = np.random.default_rng(2).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(full), kind)
    refused = 0
    for length in {*range(0, len(data), max(1, len(data) // 60)), len(data) // 2}:
        try:
            assert load_rgb(data[:length]).shape == full.shape
        except ImageError:
            refused += 1
    assert refused >= 30
    with pytest.raises(ImageError):
        load_rgb(data[: len(data) // 2])


def test_a_lazily_opened_truncated_image_is_caught() -> None:
    data = encoded(Image.new("RGB", (200, 200), "red"), "JPEG")
    with pytest.raises(ImageError, match="JPEG image, mode RGB, 200x200 pixels, does not decode"):
        load_rgb(Image.open(io.BytesIO(data[:-300])))


def test_hash_is_blake2b_of_the_shape_and_the_rgb_bytes(rgb: np.ndarray) -> None:
    expected = hashlib.blake2b(b"6x9:" + rgb.tobytes(), digest_size=16).hexdigest()
    assert pixel_hash(rgb) == pixel_hash(Image.fromarray(rgb)) == expected
    assert pixel_hash(rgb.reshape(9, 6, 3)) != expected
    changed = rgb.copy()
    changed[5, 8, 2] ^= 1
    assert pixel_hash(changed) != expected


def test_a_file_cut_short_is_an_error_whatever_others_told_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while several threads decode, and what the others told Pillow stays as it was."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval does when it is imported
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(buffer, "PNG")
    whole, cut = buffer.getvalue(), buffer.getvalue()[:100_000]
    failed: list[bool] = []

    def work(data: bytes) -> None:
        for _ in range(10):
            try:
                load_rgb(data)
            except ImageError:
                failed.append(True)

    threads = [threading.Thread(target=work, args=(data,)) for data in (whole, cut, whole, cut)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 20
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
