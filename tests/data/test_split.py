"""A split is seeded, keeps the shares of classes, and never parts images that look alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_detect.data.formats import importing
from gn_detect.data.formats.importing import deal, group_alike, split_content
from tests.refusal import refusal


def scene(seed: int) -> np.ndarray:
    """Return a picture of soft blobs on black, as microscopes make."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :128]
    picture = np.zeros((96, 128))
    for _ in range(12):
        cx, cy, size = random.uniform(0, 128), random.uniform(0, 96), random.uniform(4, 12)
        picture += 90 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / size**2)
    return picture.clip(0, 255)


def write(folder: Path, pictures: dict[str, np.ndarray]) -> list[Path]:
    for name, picture in pictures.items():
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
    return [folder / name for name in pictures]


def near(picture: np.ndarray) -> dict[str, np.ndarray]:
    """Return what a person would call the same picture."""
    noise = np.random.default_rng(9).normal(0, 3, picture.shape)
    larger = np.asarray(Image.fromarray(picture.astype(np.uint8)).resize((192, 144)), dtype=float)
    return {
        "same.png": picture,
        "noisy.jpg": picture + noise,
        "bright.png": picture * 1.15,
        "large.png": larger,
    }


def test_near_duplicates_are_one_group(tmp_path: Path) -> None:
    others = {f"frame_{seed}.png": scene(seed) for seed in range(2, 40)}  # one stem, other pictures
    paths = write(tmp_path, {"a.png": scene(1), **near(scene(1)), **others})
    groups = group_alike(paths)
    assert len(set(groups[:5].tolist())) == 1
    assert len(set(groups[4:].tolist())) == 39


def test_many_images_are_compared_with_their_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write(tmp_path, {f"{seed:02d}.png": scene(seed // 2) for seed in range(20)})
    monkeypatch.setattr(importing, "_WHOLE", 5)
    monkeypatch.setattr(importing, "_NEAR", 3)
    monkeypatch.setattr(importing, "_ROWS", 2)
    assert len(set(group_alike(paths).tolist())) == 10


def test_shares_of_rare_classes() -> None:
    """Class 1 is in each tenth of 200 images and class 2 in ten of them, which chance may miss."""
    random = np.random.default_rng(0)
    counts = np.zeros((200, 4))
    counts[:, 0], counts[:, 3] = random.integers(1, 9, 200), 1
    counts[::10, 1] = 2
    counts[random.choice(200, 10, replace=False), 2] = 1
    for seed in range(10):
        held = deal(counts, np.arange(200), 0.8, seed)
        share = counts[held].sum(axis=0) / counts.sum(axis=0)
        assert held.sum() == pytest.approx(40, abs=4)
        assert share == pytest.approx([0.2] * 4, abs=0.05)
    assert (deal(counts, np.arange(200), 0.8, 1) == deal(counts, np.arange(200), 0.8, 1)).all()
    assert (deal(counts, np.arange(200), 0.8, 1) != deal(counts, np.arange(200), 0.8, 2)).any()


def content(names: list[str]) -> dict:
    return {
        "images": [
            {"id": i, "file_name": name, "height": 96, "width": 128} for i, name in enumerate(names, 1)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in range(1, len(names) + 1)
        ],
        "categories": [{"id": 1, "name": "x"}],
    }


def test_a_group_stays_together(tmp_path: Path) -> None:
    pictures = {f"{seed}{copy}.png": scene(seed) for seed in range(8) for copy in "abc"}
    write(tmp_path, pictures)
    train, val, how = split_content(content(list(pictures)), tmp_path, 0.75, 3)
    seeds = [{image["file_name"][0] for image in part["images"]} for part in (train, val)]
    assert not seeds[0] & seeds[1]
    assert [len(part["annotations"]) for part in (train, val)] == [18, 6]
    assert "18 and 6 images" in how
    assert "16 look like another one" in how


def test_images_that_all_look_alike(tmp_path: Path) -> None:
    pictures = {f"{number}.png": scene(0) for number in range(10)}
    write(tmp_path, pictures)
    train, val, how = split_content(content(list(pictures)), tmp_path, 0.8, 0)
    assert [len(part["images"]) for part in (train, val)] == [8, 2]
    assert "all look alike" in how


def test_too_few_and_damaged_images(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": scene(0)})
    with refusal("bad-argument", "1 image"):
        split_content(content(["a.png"]), tmp_path, 0.8, 0)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with refusal("unreadable-image", "b.png"):
        split_content(content(["a.png", "b.png"]), tmp_path, 0.8, 0)
