"""Rows, grids and files of pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_detect.errors import UserError
from gn_detect.visualize import encode_picture, save_picture, save_picture_grid, side_by_side


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pictures_stand_side_by_side_under_their_titles() -> None:
    low, high = noise(100, 150), noise(200, 100)
    row = side_by_side([low, high])
    assert row.shape == (200, 300 + 8 + 100, 3)
    assert np.array_equal(row[:, -100:], high)
    titled = side_by_side([low, high], ["truth", "found"])
    assert np.array_equal(titled[-200:], row)
    strip = titled[:-200]
    assert (strip[:, 100:200] < 100).any()
    assert (strip[:, -70:-30] < 100).any()
    assert (strip[:, :50] == 255).all()
    with pytest.raises(ValueError, match="1 titles for 2 pictures"):
        side_by_side([low, high], ["truth"])


def test_grid_rows_have_one_width(tmp_path: Path) -> None:
    save_picture_grid(
        tmp_path / "new" / "grid.png", [[noise(100, 150), noise(50, 80)], [noise(200, 100)], []]
    )
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.format == "PNG"
        assert picture.mode == "RGB"
        assert picture.width > 150
        assert picture.height > 150
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_picture_formats_follow_the_suffix(tmp_path: Path) -> None:
    for suffix, kind in ((".png", "PNG"), (".JPG", "JPEG"), (".webp", "WEBP")):
        save_picture(tmp_path / f"a{suffix}", noise(20, 30))
        with Image.open(tmp_path / f"a{suffix}") as picture:
            assert picture.format == kind
            assert picture.size == (30, 20)
    with pytest.raises(UserError, match=r"a\.bmpp: its name must end in \.png"):
        save_picture(tmp_path / "a.bmpp", noise(20, 30))


def test_a_failed_save_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_picture_grid(path, [[noise(20, 30)]])
    before = path.read_bytes()

    def full_disk(self: Image.Image, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match=r"grid\.png: No space left"):
        save_picture_grid(path, [[noise(40, 30)]])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_legends_stand_above_their_pictures() -> None:
    legends = [[("3 found", "#0000ff")], [("1 false", "#ff0000")]]
    row = side_by_side([noise(200, 400), noise(200, 400)], ["truth", "found"], legends)
    strip = row[:-200].astype(int)
    blue = (strip[..., 2] > 200) & (strip[..., 0] < 50)
    red = (strip[..., 0] > 200) & (strip[..., 2] < 50)
    assert blue[:, :400].any()
    assert not blue[:, 408:].any()
    assert red[:, 408:].any()
    assert not red[:, :400].any()
    with pytest.raises(ValueError, match="1 legends for 2 pictures"):
        side_by_side([noise(20, 30), noise(20, 30)], ["truth", "found"], legends[:1])


def test_pictures_are_encoded_at_a_limited_width(tmp_path: Path) -> None:
    for width, expected in ((300, (300, 100)), (900, (600, 67))):
        (tmp_path / "a.webp").write_bytes(encode_picture(noise(100, width), 600))
        with Image.open(tmp_path / "a.webp") as picture:
            assert picture.format == "WEBP"
            assert picture.size == expected


@pytest.mark.parametrize(
    ("height", "size"), [(16383, (40, 16383)), (17000, (39, 16383)), (90000, (7, 16383))]
)
def test_pictures_are_encoded_at_the_height_that_webp_has(height: int, size: tuple[int, int]) -> None:
    picture = np.zeros((height, 40, 3), np.uint8)
    with Image.open(io.BytesIO(encode_picture(picture, 600))) as found:
        assert found.size == size
