"""Every kind of image file becomes the same three channels, or an error that names it."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from gn_detect.data import images, read_image
from gn_detect.errors import UserError
from tests.refusal import refusal


def picture(height: int = 20, width: int = 30) -> np.ndarray:
    """Smooth colours, so that JPEG keeps them."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 200 // width, y * 200 // height, 255 - x * 100 // width], axis=2).astype(np.uint8)


def test_channel_orders_mirror_each_other(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", "RGB"), picture())
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture()[:, :, ::-1])
    with refusal("unsupported-value", "INPUT.FORMAT 'YUV'"):
        read_image(tmp_path / "a.png", "YUV")


def test_greyscale_palette_alpha_and_16_bits(tmp_path: Path) -> None:
    grey = picture()[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "grey_alpha.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.dstack([expected, np.full_like(grey, 7)])).save(tmp_path / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) << 8 | 99).save(tmp_path / "deep.png")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_image(path, "RGB"), expected, err_msg=path.name)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_some_rows_at_a_time_are_what_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, orientation: int
) -> None:
    monkeypatch.setattr(images, "_PIXELS_AT_ONCE", 70)  # two or three rows
    stored = Image.fromarray(picture()).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "a.tif", exif=exif)
    expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.tif", "RGB"), expected if orientation == 1 else np.rot90(expected, -1)
    )


@pytest.mark.parametrize("largest", [255, 256, 4095, 65535])
@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "uint16"), ("a.tiff", "uint16"), ("a.tiff", ">u2"), ("a.tiff", "int32")]
)
def test_more_than_8_bits_are_read_alike_whatever_the_picture_holds(
    tmp_path: Path, name: str, kind: str, largest: int
) -> None:
    """The brightest pixel of an image does not decide about the others."""
    values = np.arange(20 * 30).reshape(20, 30) * 7 % 250
    values[0, 0] = largest
    Image.fromarray(values.astype(kind)).save(tmp_path / name)
    found = read_image(tmp_path / name, "RGB")
    np.testing.assert_array_equal(found, np.repeat(values[:, :, None] >> 8, 3, axis=2))


def test_32_bits_are_cut_at_16(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-5, 0, 511, 65536, 2**30]], dtype=np.int32)).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 0, 1, 255, 255]


def test_one_bit_image(tmp_path: Path) -> None:
    Image.fromarray(picture()[:, :, 0] > 100).save(tmp_path / "bits.png")
    assert set(np.unique(read_image(tmp_path / "bits.png"))) == {0, 255}


def test_cmyk_jpeg_looks_like_its_rgb(tmp_path: Path) -> None:
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    found = read_image(tmp_path / "a.jpg", "RGB")
    assert np.abs(found.astype(int) - picture()).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = picture(20, 30)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    save_with_orientation(tmp_path / "a.png", np.ascontiguousarray(undo(upright)), orientation)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", "RGB"), upright)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", "RGB", (20, 30)), upright)


def save_with_orientation(path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def test_exif_orientation_is_ignored_if_only_the_stored_picture_has_the_annotated_size(
    tmp_path: Path,
) -> None:
    save_with_orientation(tmp_path / "a.png", picture(20, 30), 6)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", "RGB", (20, 30)), picture(20, 30))
    assert read_image(tmp_path / "a.png", "RGB", (30, 20)).shape == (30, 20, 3)


def test_damaged_exif_block_does_no_harm(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0")
    assert read_image(tmp_path / "a.jpg").shape == (20, 30, 3)


def test_size_other_than_annotated_is_refused(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with refusal("size-differs", "a.png", "30x20", "40x20"):
        read_image(tmp_path / "a.png", expected_size=(20, 40))


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with refusal("unreadable-image", name) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    with refusal("missing-image", "no.jpg"):
        read_image(tmp_path / "no.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for path in (tmp_path / "text.jpg", tmp_path / "empty.jpg", tmp_path):
        with pytest.raises(UserError, match="cannot read image"):
            read_image(path)
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    with refusal("unreadable-image", "floating-point"):
        read_image(tmp_path / "float.tiff")


def test_formats_that_pillow_reads_and_we_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("another program was started")

    monkeypatch.setattr(subprocess, "check_call", started)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(postscript)
    for name, kind in (("b.png", "TGA"), ("c.png", "PCX"), ("d.jpg", "ICO"), ("e.tif", "SGI")):
        Image.fromarray(picture()).save(tmp_path / name, format=kind)
    for path in sorted(tmp_path.iterdir()):
        with refusal("unreadable-image", "JPEG, PNG, "):
            read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000"])
def test_every_format_is_read_whatever_the_file_is_called(tmp_path: Path, kind: str) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.dat", format=kind)
    found = read_image(tmp_path / "a.dat", "RGB").astype(int)
    assert found.shape == (20, 30, 3)
    assert np.abs(found - picture()).mean() < 8


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes and devices here")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
        for name in ("pipe.png", "zero.png", "s.png"):
            with refusal("unreadable-image", name):
                read_image(tmp_path / name)
    Image.fromarray(picture()).save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    np.testing.assert_array_equal(read_image(tmp_path / "link.png", "RGB"), picture())
