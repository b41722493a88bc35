"""An image's name that is nearly there leads to its file, and nothing else does."""

from __future__ import annotations

import time
import unicodedata
from pathlib import Path

import pytest

from gn_detect.data.coco.file_names import missing_names, nearby_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes empty files; only names matter."""
    for name in ("im1.png", "Capture décran 1.png", "train/0 1.jpg", "a+b.png", "IMG_7.JPG", "%41.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Capture%20d%C3%A9cran%201.png", "Capture décran 1.png"),
        ("Capture%2520d%25C3%25A9cran%25201.png", "Capture décran 1.png"),
        (unicodedata.normalize("NFD", "Capture décran 1.png"), "Capture décran 1.png"),
        ("/data/local-files/?d=path/im1.png", "im1.png"),
        ("/data/local-files/?d=train%5C0%201.jpg", "train/0 1.jpg"),
        ("/data/local-files/?d=set/train/0+1.jpg", "train/0 1.jpg"),
        ("https://host/bucket/im1.png?X-Amz-Date=1&sig=a/b", "im1.png"),
        ("train\\0 1.jpg", "train/0 1.jpg"),
        ("C:\\Users\\me\\train\\0 1.jpg", "train/0 1.jpg"),
        ("C:/Users/me/im1.png", "im1.png"),
        ("/home/other/images/im1.png", "im1.png"),
        ("../images/im1.png", "im1.png"),
        ("images/IM1.PNG", "im1.png"),
        ("im1.PNG", "im1.png"),
        ("img_7.jpg", "IMG_7.JPG"),
        ("TRAIN/0 1.JPG", "train/0 1.jpg"),
        ("im1.png\n", "im1.png"),
        ("a%2Bb.png", "a+b.png"),
        ("Capture+d%C3%A9cran+1.png", "Capture décran 1.png"),
        ("train/0+1.jpg", "train/0 1.jpg"),
    ],
)
def test_names_that_are_nearly_there(folder: Path, name: str, found: str) -> None:
    assert missing_names(folder, [name]) == {name: found}


@pytest.mark.parametrize(
    "name", ["im2.png", "im1.jpg", "0 1.jpg", "..", "/", "a\0b", "?d=", "x" * 5000, "%41%.png"]
)
def test_names_that_are_not(folder: Path, name: str) -> None:
    assert missing_names(folder, [name]) == {name: None}


def test_names_that_are_there_are_right(folder: Path) -> None:
    assert (
        missing_names(folder, ["im1.png", "./im1.png", "train/0 1.jpg", "%41.png", str(folder / "im1.png")])
        == {}
    )


def test_names_that_lead_out_may_be_refused(folder: Path) -> None:
    """What is not read counts as missing, also where there is such a file."""
    names = [str(folder / "im1.png"), f"../{folder.name}/a+b.png", "IMG_7.JPG"]
    assert missing_names(folder, names) == {}
    assert missing_names(folder, names, outside=False) == {names[0]: "im1.png", names[1]: "a+b.png"}


def test_two_candidates_are_no_obvious_reading(folder: Path) -> None:
    (folder / "Im2.png").touch()
    (folder / "iM2.png").touch()
    assert missing_names(folder, ["im2.png"]) == {"im2.png": None}
    (folder / "a b.png").touch()
    (folder / "x%20y.png").touch()
    (folder / "x y.png").touch()
    assert missing_names(folder, ["c:\\x%20y.png"]) == {"c:\\x%20y.png": None}


def test_a_file_answers_one_name_alone(folder: Path) -> None:
    """Two foreign folders may hold files of one name, and an image that has its file keeps it."""
    assert set(missing_names(folder, ["/a/im1.png", "/b/im1.png"]).values()) == {None}
    assert missing_names(folder, ["/a/im1.png", "im1.png"]) == {"/a/im1.png": None}
    assert missing_names(folder, ["/a/im1.png", "/a/im1.png"]) == {"/a/im1.png": "im1.png"}


def test_a_path_alone(folder: Path) -> None:
    assert nearby_file(folder / "IM1.png") == folder / "im1.png"
    assert nearby_file(folder / "gone" / "im1.png") == folder / "im1.png"
    assert nearby_file(folder / "im1.png") is None
    assert nearby_file(folder / "no.png") is None


def test_many_names_take_seconds(folder: Path) -> None:
    """A listing of each folder, not a look at every file for every name."""
    for number in range(500):
        (folder / f"{number}.png").touch()
    names = [f"C:\\a\\b\\{number}%20.PNG" for number in range(30_000)]
    begin = time.process_time()
    missing_names(folder, names)
    assert time.process_time() - begin < 6
