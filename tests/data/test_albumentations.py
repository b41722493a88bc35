"""Pipeline files of albumentations: pixels, masks, boxes and seeds; damaged and disallowed files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gn_detect.data import build_train_loader
from gn_detect.data.albumentations_pipeline import (
    GROUPS,
    OF_OBJECTS,
    OF_PIXELS,
    AlbumentationsPipeline,
    fingerprint,
    import_albumentations,
)
from gn_detect.data.transforms import LabelledImage, bitmap_bounds, flip_horizontal
from gn_detect.errors import UserError
from tests.data.test_loader import assert_same
from tests.refusal import refusal

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("albumentations") is None,
    reason="needs the extra 'albumentations', which is not installed: pip install 'albumentations>=2,<3'",
)


def step(name: str, **arguments: Any) -> dict[str, Any]:
    return {"__class_fullname__": name, "p": 1.0, **arguments}


FLIP = step("HorizontalFlip")


def content(*steps: Any, **others: Any) -> dict[str, Any]:
    """What albumentations.save writes."""
    rest = {"bbox_params": None, "keypoint_params": None, "additional_targets": {}, "is_check_shapes": True}
    compose = step("Compose", transforms=list(steps), **rest)
    return {"__version__": "2.0.8", "transform": compose | others}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(*steps: Any, **others: Any) -> str:
        path = tmp_path / "pipeline.json"
        path.write_text(json.dumps(content(*steps, **others)))
        return str(path)

    return write


def scene() -> LabelledImage:
    """A bitmap and a polygon, whose boxes are wider than they are; a box reaches out of the image."""
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    square = np.zeros((24, 40), dtype=bool)
    square[2:8, 5:12] = True
    polygon = [np.array([20.0, 10, 30, 10, 30, 20, 20, 20])]
    boxes = np.array([[4.0, 1, 13, 9], [19, 9, 45, 21]])
    return LabelledImage(image, boxes, np.array([3, 1]), [square, polygon])


@needs_package
def test_masks_move_with_the_pixels_and_boxes_are_those_of_the_masks(write: Callable) -> None:
    found = AlbumentationsPipeline(write(FLIP))(scene(), np.random.default_rng(0))
    expected = flip_horizontal(scene())
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.masks[0], expected.masks[0])
    assert found.masks[1].dtype == bool
    assert found.boxes.tolist() == [[28, 2, 35, 8], [10, 10, 20, 20]]
    assert found.boxes.tolist() == [bitmap_bounds(mask).tolist() for mask in found.masks]
    assert found.labels.tolist() == [3, 1]


@needs_package
def test_objects_that_leave_the_image_are_dropped(write: Callable) -> None:
    away = step("Affine", translate_px={"x": [-15, -15], "y": [0, 0]})
    found = AlbumentationsPipeline(write(away))(scene(), np.random.default_rng(0))
    assert found.labels.tolist() == [1]
    assert found.boxes.tolist() == [[5, 10, 15, 20]]
    np.testing.assert_array_equal(found.image[:, :25], scene().image[:, 15:])
    boxes = LabelledImage(scene().image, scene().boxes, scene().labels)
    found = AlbumentationsPipeline(write(away))(boxes, np.random.default_rng(0))
    assert found.masks is None
    assert found.labels.tolist() == [1]
    np.testing.assert_allclose(found.boxes, [[4, 9, 25, 21]])  # clipped to the image before it moved


@needs_package
def test_pixels_alone_leave_masks_and_boxes(write: Callable) -> None:
    given = scene()
    found = AlbumentationsPipeline(write(step("InvertImg")))(given, np.random.default_rng(0))
    np.testing.assert_array_equal(found.image, 255 - given.image)
    assert found.masks is given.masks and found.boxes is given.boxes


@needs_package
def test_images_without_objects(write: Callable) -> None:
    empty = scene().select(np.zeros(2, dtype=bool))
    found = AlbumentationsPipeline(write(FLIP))(empty, np.random.default_rng(0))
    np.testing.assert_array_equal(found.image, empty.image[:, ::-1])
    assert (found.boxes.shape, found.masks) == ((0, 4), [])


@needs_package
def test_the_generator_decides_and_transforms_are_independent(write: Callable) -> None:
    """With a seed, albumentations gives each transform an equal stream: all would act, or none."""
    path = write(step("InvertImg", p=0.5), step("VerticalFlip", p=0.5), step("GaussNoise", p=0.0))
    pipeline, given, seen = AlbumentationsPipeline(path), scene(), set()
    for seed in range(40):
        found = pipeline(given, np.random.default_rng([1, seed]))
        again = AlbumentationsPipeline(path)(given, np.random.default_rng([1, seed]))
        np.testing.assert_array_equal(found.image, again.image)
        options = {
            (inverted, flipped): (255 - given.image if inverted else given.image)[:: -1 if flipped else 1]
            for inverted in (False, True)
            for flipped in (False, True)
        }
        seen.update(key for key, image in options.items() if np.array_equal(image, found.image))
    assert len(seen) == 4


@needs_package
def test_batches_depend_on_seed_and_position_alone(
    write: Callable, write_dataset: Callable, small_coco: dict, make_cfg: Callable
) -> None:
    noise = step("GaussNoise", std_range=[0.1, 0.3])
    group = {"__class_fullname__": "OneOf", "p": 0.8, "transforms": [noise, step("CLAHE", p=0.5)]}
    path, source = write(step("Rotate", p=0.7), group), write_dataset(small_coco)

    def batches(start: int = 0, workers: int = 0, **changes: Any) -> list[Any]:
        cfg = make_cfg(source, input__albumentations=path, dataloader__num_workers=workers, **changes)
        return list(islice(build_train_loader(cfg, start_iteration=start)[0], 8 - start))

    whole = batches()
    assert_same(whole, batches(workers=2))
    assert_same(whole[5:], batches(start=5))
    for sample in sum(batches(input__mask_format="bitmask"), []):
        masks = [mask.numpy() for mask in sample.target.masks]
        np.testing.assert_array_equal(sample.target.boxes, [bitmap_bounds(mask) for mask in masks])


@needs_package
def test_a_copy_for_another_process_does_the_same(write: Callable) -> None:
    pipeline = AlbumentationsPipeline(write(step("Rotate"), step("ISONoise")))
    copy = pickle.loads(pickle.dumps(pipeline))
    found, again = (each(scene(), np.random.default_rng(5)) for each in (pipeline, copy))
    np.testing.assert_array_equal(found.image, again.image)
    assert found.boxes.tolist() == again.boxes.tolist()


@needs_package
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_files_that_albumentations_wrote(tmp_path: Path, kind: str) -> None:
    package = import_albumentations()
    group = package.OneOf(
        [package.Blur(p=0.5), package.Sequential([package.RandomGamma(), package.ToGray()])]
    )
    boxes = package.BboxParams(format="coco", label_fields=["classes"])
    made = package.Compose(
        [package.Affine(scale=(0.9, 1.1), rotate=(-1e-05, 20)), group], bbox_params=boxes, seed=3
    )
    path = str(tmp_path / "file")
    package.save(made, path, data_format=kind)
    for seed in range(6):
        found = AlbumentationsPipeline(path)(scene(), np.random.default_rng(seed))
        assert found.boxes.tolist() == [bitmap_bounds(mask).tolist() for mask in found.masks]
        assert found.image.shape == (24, 40, 3)


@needs_package
def test_each_allowed_transform_does_what_its_list_says() -> None:
    """Results are 8-bit RGB; those of pixels leave masks alone; none takes a file or another image."""
    package = import_albumentations()
    image, mask = scene().image, scene().masks[0].view(np.uint8)
    foreign = {"reference_images", "read_fn", "font_path", "metadata_key"}
    for name in (*OF_PIXELS, *OF_OBJECTS):
        kind = getattr(package, name)
        parameters = inspect.signature(getattr(kind.__init__, "__wrapped__", kind.__init__)).parameters
        assert not foreign & {*parameters}, name
        transform = kind(p=1.0)
        assert isinstance(transform, package.ImageOnlyTransform) == (name in OF_PIXELS), name
        found = package.Compose([transform], seed=1)(image=image, mask=mask)
        assert (found["image"].dtype, found["image"].shape[2:]) == (np.uint8, (3,)), name
        assert found["image"].size == image.size, name
        assert name in OF_OBJECTS or np.array_equal(found["mask"], mask), name


def test_the_page_lists_the_transforms(repository: Path) -> None:
    text = (repository / "docs" / "your-data.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- (?:Pixels alone|Objects as well): (.+?)\.$", text, re.MULTILINE | re.DOTALL)
    assert [re.split(r",\s+", names) for names in listed] == [[*OF_PIXELS], [*OF_OBJECTS]]


NESTED: dict[str, Any] = FLIP
for _ in range(12):
    NESTED = {"__class_fullname__": "Sequential", "p": 1.0, "transforms": [NESTED]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[1, 2]",
        "a: [1",
        "a: &x [*x]",
        '{"transform": 3}',
        json.dumps({"transform": FLIP}),
        json.dumps(content()).replace("[]", "5"),
        json.dumps(content(**{"p": "often"})),
        json.dumps(content(**{"p": 3})),
        json.dumps(content({"__class_fullname__": "OneOf", "p": 1.0})),
        json.dumps(content(step("Blur", blur_limit=[3, 4001]))),
        json.dumps(content(step("Blur", p=float("nan")))),
        json.dumps(content(step("Affine", scale={"x": [0.5, float("inf")]}))),
        json.dumps(content(step("Affine", fit_output=True))),
        json.dumps(content(step("Perspective", keep_size=False))),
        json.dumps(content(step("Rotate", crop_border=True))),
        "transform: {__class_fullname__: Compose, p: .nan, transforms: []}",
        "transform: !!python/name:os.system",
        "transform: &t {__class_fullname__: Compose, transforms: [*t]}",
        "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{f'b{i - 1}' if i else 'a'}, *a]\n" for i in range(40)),
        json.dumps(content(NESTED)),
        json.dumps(content(*[FLIP] * 40)),
        '{"transform": ' + "[" * 30000 + "]" * 30000 + "}",
        '{"transform": {"__class_fullname__": "Compose", "transforms": [], "p": ' + "9" * 5000 + "}}",
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    """Also without the package: a file is checked before anything is built."""
    path = tmp_path / "pipeline"
    path.write_text(text)
    with refusal("not-a-pipeline", str(path)) as caught:
        AlbumentationsPipeline(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 500


@needs_package
@pytest.mark.parametrize(
    "wrong",
    [
        step("HorizontalFlip", always=1),  # an argument of version 1, or a typing error
        step("Blur", blur_limit="large"),
        step("Rotate", limit=None),
        step("GaussNoise", std_range=[5, 9]),
        step("Rotate", interpolation=77),
        step("Blur", blur_limit=json.loads("[" * 900 + "]" * 900)),
    ],
)
def test_values_that_albumentations_refuses(write: Callable, wrong: dict) -> None:
    path = write(FLIP, wrong)
    with refusal("not-a-pipeline", path, "albumentations refuses") as caught:
        AlbumentationsPipeline(path)
    assert "\n" not in str(caught.value)


@needs_package
@pytest.mark.parametrize(
    "wrong", [step("ToGray", num_output_channels=1), step("GridDistortion", num_steps=1000)]
)
def test_results_that_no_network_takes(write: Callable, wrong: dict) -> None:
    path = write(wrong)
    with refusal("not-a-pipeline", path):
        AlbumentationsPipeline(path)(scene(), np.random.default_rng(0))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "TextImage",
            "FDA",
            "HistogramMatching",
            "Lambda",
            "Resize",
            "PadIfNeeded",
            "RandomCrop",
            "Normalize",
        ),
        *("ToTensorV2", "os.system", "Compose", "a\x1b[31m\nb" + "x" * 400, None, ["Blur"], {"Blur": 1}),
    ],
)
def test_other_transforms_are_refused(write: Callable, name: Any) -> None:
    for steps in (
        [step(name)],
        [FLIP, {"__class_fullname__": GROUPS[0], "p": 1.0, "transforms": [step(name)]}],
    ):
        path = write(*steps)
        with refusal("refused-transform", path) as caught:
            AlbumentationsPipeline(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < len(path) + 300


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    (tmp_path / "large").write_text(" " * (1 << 17))
    for name, code in (
        ("none", "cannot-read"),
        ("bytes", "cannot-read"),
        (".", "cannot-read"),
        ("large", "oversized-file"),
    ):
        with refusal(code, str(tmp_path / name)):
            AlbumentationsPipeline(str(tmp_path / name))


def test_a_fingerprint_is_that_of_the_content(write: Callable, tmp_path: Path) -> None:
    path = write(FLIP)
    other = tmp_path / "moved.json"
    other.write_bytes(Path(path).read_bytes())
    before = fingerprint(path)
    assert fingerprint(str(other)) == before
    assert fingerprint(write(FLIP, FLIP)) != before


@pytest.mark.parametrize("version", [None, "1.4.24", "3.0.0"])
def test_without_version_2_the_command_that_installs_it_is_named(
    write: Callable, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    """AlbumentationsX is another package."""

    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with refusal("missing-package", "pip install 'albumentations>=2,<3'", version or "none"):
        AlbumentationsPipeline(write(FLIP))


@pytest.mark.parametrize("before", [None, "0"])
def test_the_import_does_not_ask_for_newer_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """A stand-in for the package records its environment, which is then as it was; also after a failure."""
    key = "NO_ALBUMENTATIONS_UPDATE"
    monkeypatch.setenv(key, "x")
    if before is None:
        monkeypatch.delenv(key)
    else:
        monkeypatch.setenv(key, before)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.8")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = sys.modules.pop("albumentations", None)
    for text in ("import os; seen = dict(os.environ)", "raise ImportError('broken')"):
        (tmp_path / "albumentations.py").write_text(text)
        importlib.invalidate_caches()
        try:
            assert import_albumentations().seen[key] == "1"
        except ImportError:
            assert "broken" in text
        sys.modules.pop("albumentations", None)
        assert os.environ.get(key) == before
    if loaded is not None:
        sys.modules["albumentations"] = loaded


@needs_package
@pytest.mark.slow
def test_no_contact_with_the_network(repository: Path) -> None:
    """In a process of its own, where a connection or the look-up of a name ends the process."""
    code = """
import os, socket
def refuse(*_, **__): os._exit(9)
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from gn_detect.data.albumentations_pipeline import import_albumentations
package = import_albumentations()
assert "NO_ALBUMENTATIONS_UPDATE" not in os.environ
if os.environ.get("ASK"):
    package.check_version.check_for_updates()
"""
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    for asks, status in (({}, 0), ({"ASK": "1"}, 9)):
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, cwd=repository, env=environment | asks).returncode == status


@needs_package
def test_errors_in_workers_are_one_line(
    write: Callable, write_dataset: Callable, small_coco: dict, make_cfg: Callable
) -> None:
    path = write(step("GridDistortion", num_steps=1000))
    cfg = make_cfg(write_dataset(small_coco), input__albumentations=path, dataloader__num_workers=1)
    with pytest.raises(UserError, match="albumentations refuses it: .*division"):
        list(islice(build_train_loader(cfg)[0], 2))
