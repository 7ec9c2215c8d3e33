"""The contact sheet: every noise is on it, each cell shows that noise, and mistakes are explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitquake.noise import ImageError, NoiseError, SampleKey, apply, image_noises
from bitquake.noise import sheet as sheet_module
from bitquake.noise.sheet import contact_sheet, save_image

KEY = SampleKey("sheet", "test", "1")


def picture(height: int = 90, width: int = 120) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 2, y * 2, (x + y) % 64 * 4], axis=2).astype(np.uint8)


def find(sheet: Image.Image, tile: np.ndarray) -> tuple[int, int] | None:
    """Where a tile stands on the sheet, pixel for pixel, by comparing it everywhere its first row fits."""
    pixels = np.asarray(sheet)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[:, :, :], (1, 8, 3))[:, :, 0, 0]
    starts = np.argwhere((windows == tile[0, :8]).all(axis=(2, 3)))
    for y, x in starts:
        if np.array_equal(pixels[y : y + tile.shape[0], x : x + tile.shape[1]], tile):
            return int(x), int(y)
    return None


def test_each_cell_is_the_small_picture_with_that_noise() -> None:
    image = picture(300, 400)
    names = ["gaussian_noise", "contrast", "defocus_blur"]
    sheet = contact_sheet(image, names=names, severities=(1, 4), key=KEY, seed=3, width=600)
    assert sheet.mode == "RGB" and sheet.width == 600
    small = Image.fromarray(image)
    small.thumbnail(((600 - 170 - 18) // 3,) * 2, Image.Resampling.LANCZOS)  # labels, three columns with gaps
    places = {
        (name, s): find(sheet, np.asarray(apply(small, name, severity=s, key=KEY, seed=3)))
        for name in names
        for s in (1, 4)
    }
    rows = [places[name, 1][1] for name in names]
    assert rows == sorted(set(rows))
    for name in names:
        (x1, y1), (x4, y4) = places[name, 1], places[name, 4]
        assert y1 == y4 and x1 < x4
    assert find(sheet, np.asarray(small)) == (170, rows[0])  # clean comes first


def test_all_noises_are_on_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageDraw

    written: list[str] = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, at, text, *a, **k: (written.append(text), draw(self, at, text, *a, **k)),
    )
    sheet = contact_sheet(picture(), severities=(3,), key=KEY, question="What is this\nthing " + "very " * 40 + "big?")
    from bitquake.noise import text_noises

    assert set(image_noises()) | set(text_noises()) | {"clean", "severity 3"} <= set(written)
    font = sheet_module._font(14)
    assert all(font.getlength(text) <= sheet.width - 170 for text in written)  # long questions are wrapped
    assert "What is this" in written


def test_groups_names_and_text_alone() -> None:
    image = picture()
    camera = contact_sheet(image, names=["camera"], severities=(1,), key=KEY)
    one = contact_sheet(image, names=["occlusion"], severities=(1,), key=KEY)
    assert camera.height > 4 * one.height
    twice = contact_sheet(image, names=["occlusion", "camera", "occlusion"], severities=(1,), key=KEY)
    assert twice.size == camera.size
    text = contact_sheet(image, names=["word_drop"], severities=(1,), key=KEY)
    assert text.height < one.height and contact_sheet(image, names=["text"], key=KEY).height > 3 * text.height


def test_any_picture_fits() -> None:
    for shape in ((1, 1), (400, 3), (3, 400), (2000, 1500)):
        assert contact_sheet(picture(*shape), severities=(5,), key=KEY, width=500).width == 500
    tall = contact_sheet(picture(400, 300), names=["rotation"], severities=(5,), key=KEY)
    assert tall.height < 1280


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"names": ["gausian_noise"]}, NoiseError, "Did you mean 'gaussian_noise'"),
        ({"severities": (0,)}, NoiseError, "severities 1 to 5"),
        ({"severities": ()}, NoiseError, "at least one"),
        ({"width": 100}, NoiseError, "at least 480 pixels"),
        ({"image": None}, ImageError, "nothing there"),
        ({"image": b"GIF89a"}, ImageError, "no image"),
    ],
)
def test_mistakes_are_explained(change: dict[str, Any], error: type[Exception], message: str) -> None:
    request: dict[str, Any] = {"image": picture(), "key": KEY} | change
    with pytest.raises(error, match=message):
        contact_sheet(request.pop("image"), **request)


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(picture())
    for ending in (".png", ".jpg", ".webp", ".PNG"):
        save_image(image, tmp_path / f"a{ending}")
        assert Image.open(tmp_path / f"a{ending}").size == image.size
    with pytest.raises(ValueError, match=r"cannot write \.gibberish"):
        save_image(image, tmp_path / "a.gibberish")
    with pytest.raises(ValueError, match="without an ending"):
        save_image(image, tmp_path / "a")
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_image(Image.new("RGB", (3, 3)), tmp_path / "a.png")
    monkeypatch.undo()
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.png", "a.jpg", "a.webp", "a.PNG"])
