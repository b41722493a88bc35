"""gn-detect predict on folders, with damaged files, beside ground truth, and on videos."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools.coco import COCO

from gn_detect.cli import main
from gn_detect.config import load_config
from gn_detect.data.images import find_images
from gn_detect.engine import predict_files as prediction
from gn_detect.errors import UserError
from gn_detect.evaluation import detections_to_coco
from gn_detect.modeling import build_model
from gn_detect.structures import Detections
from gn_detect.weights import norm_settings, save_weights
from tests.cli.conftest import Case
from tests.refusal import refusal


class Stub:
    """A predictor that finds one object, brighter than the rest of the image."""

    class_names = ["square", "bar"]
    category_ids = [3, 7]
    report = "stub"
    score_thresholds: tuple[float, ...] = ()

    def __init__(self, _: Any = None) -> None:
        pass

    def find(self, image: np.ndarray) -> Detections:
        return self(image)

    def __call__(self, image: np.ndarray) -> Detections:
        mask = torch.from_numpy(image.max(axis=2) > 150)
        if not mask.any():
            empty = torch.zeros(0)
            return Detections(
                empty.reshape(0, 4), empty, empty.long(), torch.zeros(0, *mask.shape, dtype=torch.bool)
            )
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]).float()
        boxes, scores = box.repeat(2, 1), torch.tensor([0.9, 0.2])
        return Detections(boxes, scores, torch.tensor([0, 1]), mask.repeat(2, 1, 1))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gn_detect.engine.Predictor", Stub)


def predict(case: Case, output: Path, *arguments: object) -> int:
    return main(["predict", "--config-file", str(case.config), "--output", str(output), *map(str, arguments)])


def test_tiles(case: Case, tmp_path: Path, refused: Any) -> None:
    """By flags, by keys, and by an exported file: the same results, and other ones than without."""
    torch.manual_seed(3)
    cfg = load_config(case.config, ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.3"])
    save_weights(tmp_path / "model.pth", build_model(cfg).state_dict())
    weights = ["--weights", tmp_path / "model.pth", "--no-pictures", "--threshold", "0.3"]
    keys = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.3", "TEST.DETECTIONS_PER_IMAGE", "20"]
    image = case.train.parent / "images/001.png"
    tiles = ["TEST.TILES.SIZE", "64", "TEST.TILES.OVERLAP", "0.3"]
    flags = ["--tile", "64", "--overlap", "0.3"]
    found = []
    for name, some in (
        ("keys", [image, *keys, *tiles]),
        ("flags", [*flags, image, *keys]),
        ("no", [image, *keys]),
    ):
        assert predict(case, tmp_path / name, *weights, *some) == 0
        found.append(json.loads((tmp_path / name / "predictions.json").read_text()))
    assert found[0] == found[1] != found[2]
    assert len(found[0]) > 5
    for code, names, some in (
        ("bad-value", ["TEST.TILES.SIZE", "10"], ["--tile", "10"]),
        ("bad-value", ["TEST.TILES.OVERLAP", "0.95"], ["--tile", "64", "--overlap", "0.95"]),
        ("lone-flag", ["overlap"], ["--overlap", "0.3"]),
        ("conflicting-flags", ["--tile", "TEST.TILES.SIZE"], ["--tile", "64", image, *tiles]),
        ("bad-argument", ["--tile", "many"], ["--tile", "many"]),
    ):
        command = [
            "predict",
            "--config-file",
            case.config,
            *weights,
            "--output",
            tmp_path / "bad",
            *some,
            image,
        ]
        if image in some:
            command.pop()
        line = refused(*command)
        assert f"[{code}]" in line
        assert all(name in line for name in names), line
    assert not (tmp_path / "bad").exists()


@pytest.mark.usefixtures("stub")
def test_flags_may_stand_anywhere(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before, between and behind the images and the ``KEY VALUE`` pairs."""
    first, second = (str(case.train.parent / f"images/00{i}.png") for i in (1, 2))
    some = [first, "--output", str(tmp_path / "out"), second, "--workers", "0", "MODEL.DEVICE", "cpu"]
    assert main(["predict", "--config-file", str(case.config), *some, "--no-pictures"]) == 0
    found = json.loads((tmp_path / "out/images.json").read_text())
    assert [image["file_name"] for image in found["images"]] == [first, second]
    for unknown in ("--colour", "-c"):
        assert main(["predict", *some, unknown, "red"]) == 2
        assert f"unknown flag {unknown}; gn-detect predict --help" in capsys.readouterr().err


@pytest.mark.usefixtures("stub")
def test_each_class_has_its_own_threshold(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image, output = case.train.parent / "images/001.png", tmp_path / "out"
    auto = ["--threshold", "auto", "--no-pictures", image]
    assert predict(case, output, *auto) == 2
    assert "--threshold auto" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.setattr(Stub, "score_thresholds", [0.95, 0.15])
    assert predict(case, output, *auto) == 0
    assert "least scores: square 0.95, bar 0.15" in capsys.readouterr().out
    found = json.loads((output / "predictions.json").read_text())
    assert [entry["category_id"] for entry in found] == [7]  # a square scores 0.9, a bar 0.2
    assert predict(case, output, "--threshold", "most", image) == 2


@pytest.mark.parametrize("least", ["0.05", "0.9"])
def test_what_to_try_where_nothing_reaches_the_threshold(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], least: str
) -> None:
    """Also where MODEL.ROI_HEADS.SCORE_THRESH_TEST leaves no detection at all; the advice then works."""
    torch.manual_seed(3)
    weights, images = tmp_path / "w.pth", case.train.parent / "images"
    model = build_model(load_config(case.config))
    torch.save({"model": model.state_dict(), **norm_settings(model).to_dict()}, weights)
    threshold, key = ("--threshold", "0.97"), "MODEL.ROI_HEADS.SCORE_THRESH_TEST"
    given = ["--weights", weights, "--no-pictures", *threshold, images]
    assert predict(case, tmp_path / "out", *given, key, least) == 0
    text = capsys.readouterr().out
    found = re.search(r"the best score is (\S+), in (\S+); try --threshold (\S+)(.*)", text)
    assert found and text.count("no object scores 0.97 (--threshold) or more") == 1, text
    score, name, lower = float(found[1]), found[2], found[3]
    assert float(lower) < score < 0.97
    assert name in map(str, images.iterdir())
    assert (key in found[4]) == (score <= float(least))
    advice = ["--weights", weights, "--no-pictures", "--threshold", lower, name, key, min(lower, least)]
    assert predict(case, tmp_path / "again", *advice) == 0
    assert json.loads((tmp_path / "again/predictions.json").read_text())


def test_hidden_files_and_those_of_other_kinds_are_no_images(tmp_path: Path) -> None:
    names = ["a.jpg", "b.PNG", "._a.jpg", ".DS_Store", ".hidden.png", "Thumbs.db", "desktop.ini", "a.xml"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    for folder in (".ipynb_checkpoints", ".AppleDouble", "sub", "folder.jpg"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "copy.jpg").write_bytes(b"")
    images = [tmp_path / "a.jpg", tmp_path / "b.PNG"]
    assert find_images([str(tmp_path)]) == images
    assert find_images([f"{tmp_path}/*"]) == images
    deep = [*images, tmp_path / "folder.jpg/copy.jpg", tmp_path / "sub/copy.jpg"]
    assert find_images([f"{tmp_path}/**/*"]) == deep
    assert find_images([f"{tmp_path}/*.xml", f"{tmp_path}/._a.jpg"]) == [
        tmp_path / "a.xml",
        tmp_path / "._a.jpg",
    ]
    with refusal("no-such-image"):
        find_images([f"{tmp_path}/.ipynb_checkpoints/*.png"])


@pytest.mark.usefixtures("stub")
def test_the_best_score_is_told(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = case.train.parent / "images/001.png"
    assert predict(case, tmp_path / "out", "--json", "--threshold", 0.5, image) == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["best_score"] == pytest.approx(0.9)
    assert reported["best_input"] == str(image)


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_and_the_others_are_done(
    case: Case, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = case.train.parent / "images", tmp_path / "out"
    (images / "002.png").write_bytes(b"no picture")
    assert predict(case, output, "--workers", workers, images) == 1
    error = capsys.readouterr().err
    assert "error: cannot read image" in error
    assert "002.png" in error
    assert "1 of 4 inputs" in error
    names = sorted(path.name for path in output.iterdir())
    assert names == ["001.png", "003.png", "004.png", "images.json", "predictions.json"]
    found = json.loads((output / "predictions.json").read_text())
    assert [entry["image_id"] for entry in found] == [1, 3, 4]


@pytest.mark.usefixtures("stub")
def test_quiet_is_quiet_about_large_images(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow warns of those that are half as large as what it refuses."""
    image = case.train.parent / "images" / "001.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 80 - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(image).close()
    with warnings.catch_warnings(record=True) as caught:
        assert predict(case, tmp_path / "out", "--quiet", "--workers", 0, image) == 0
    assert not caught
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("stub")
def test_the_results_are_read_by_coco_s_tools(case: Case, tmp_path: Path) -> None:
    images, output = case.train.parent / "images", tmp_path / "out"
    assert predict(case, output, "--no-pictures", images) == 0
    assert sorted(path.name for path in output.iterdir()) == ["images.json", "predictions.json"]
    truth = COCO(str(output / "images.json"))
    found = truth.loadRes(str(output / "predictions.json"))
    assert len(found.anns) == 4
    assert set(found.cats) == {3, 7}
    for entry in found.anns.values():
        record = truth.imgs[entry["image_id"]]
        assert record["file_name"] == entry["file_name"]
        assert entry["score"] > 0.5
        pixels = np.array(Image.open(record["file_name"]))
        assert np.array_equal(found.annToMask(entry).astype(bool), pixels.max(axis=2) > 150)


@pytest.mark.usefixtures("stub")
def test_ground_truth_gives_the_ids_and_stands_beside(case: Case, tmp_path: Path) -> None:
    images, alone, beside = case.train.parent / "images", tmp_path / "alone", tmp_path / "beside"
    case.edit(lambda c: [entry.update(id=entry["id"] + 50) for entry in c["images"]])
    case.edit(lambda c: [entry.update(image_id=entry["image_id"] + 50) for entry in c["annotations"]])
    assert predict(case, alone, images / "002.png") == 0
    assert predict(case, beside, "--annotations", case.train, images / "002.png") == 0
    found = json.loads((beside / "predictions.json").read_text())
    assert [entry["image_id"] for entry in found] == [52]
    with Image.open(alone / "002.png") as one, Image.open(beside / "002.png") as two:
        assert two.width > 1.9 * one.width
        assert two.height > one.height


@pytest.mark.usefixtures("stub")
def test_ids_that_are_text_come_back(case: Case, tmp_path: Path) -> None:
    case.edit(lambda c: [entry.update(id=f"img {entry['id']}") for entry in c["images"]])
    case.edit(lambda c: [entry.update(image_id=f"img {entry['image_id']}") for entry in c["annotations"]])
    image = case.train.parent / "images" / "002.png"
    assert predict(case, tmp_path / "out", "--annotations", case.train, image) == 0
    for name, key in (("predictions.json", "image_id"), ("images.json", "id")):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert [entry[key] for entry in (found if name == "predictions.json" else found["images"])] == [
            "img 2"
        ]


@pytest.mark.usefixtures("stub")
def test_a_folder_of_more_images_than_the_ground_truth_lists(
    case: Case, tmp_path: Path, refused: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where training and validation images lie together."""
    images = case.train.parent / "images"
    listed = {entry["file_name"]: entry["id"] for entry in json.loads(case.train.read_text())["images"]}
    Image.open(images / "001.png").save(images / "other.png")
    assert predict(case, tmp_path / "out", "--annotations", case.train, images) == 0
    count = len(listed) + 1
    assert f"1 of {count} images are left out: {case.train} does not list them" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {entry["image_id"] for entry in found} == set(listed.values())
    arguments = ("predict", "--config-file", case.config, "--output", tmp_path / "none")
    (tmp_path / "others").mkdir()
    (images / "other.png").rename(tmp_path / "others" / "other.png")
    message = refused(*arguments, "--annotations", case.train, tmp_path / "others")
    assert f"lists no image of {tmp_path / 'others'}" in message
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("stub")
def test_an_image_that_is_given_twice(
    case: Case, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From two folders, by a name that the ground truth has once; its folder may be the current one."""
    images, again = case.train.parent / "images", tmp_path / "again"
    shutil.copytree(images, again)
    arguments = ("predict", "--config-file", case.config, "--annotations", case.train)
    message = refused(*arguments, "--output", tmp_path / "out", images, again)
    assert f"{again / '001.png'} and {images / '001.png'} are both image 1 of" in message
    case.edit(lambda c: [entry.update(file_name=f"images/{entry['file_name']}") for entry in c["images"]])
    monkeypatch.chdir(images)
    assert predict(case, tmp_path / "out", "--annotations", case.train, ".") == 0


@pytest.mark.usefixtures("stub")
def test_ground_truth_that_does_not_fit(case: Case, tmp_path: Path, refused: Any) -> None:
    arguments = ("predict", "--config-file", case.config, "--output", tmp_path / "out")
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    assert "[unlisted-image]" in refused(*arguments, "--annotations", case.train, other)
    case.edit(lambda c: c["categories"].append({"id": 9, "name": "new"}))
    image = case.train.parent / "images" / "001.png"
    said = refused(*arguments, "--annotations", case.train, image)
    assert "has the categories square, bar, new, and the model was trained on square, bar" in said
    assert "--workers" in refused(*arguments, "--workers", -1, image)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("stub")
def test_categories_in_another_order(case: Case, tmp_path: Path, refused: Any) -> None:
    def swap(content: dict[str, Any]) -> None:
        first, second = content["categories"]
        first["name"], second["name"] = second["name"], first["name"]

    case.edit(swap)
    arguments = ["predict", "--config-file", case.config, "--output", tmp_path / "out"]
    arguments += ["--annotations", case.train, case.train.parent / "images"]
    assert main(list(map(str, arguments))) == 0
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {entry["category_id"] for entry in found} == {7}, "squares by the id that they have here"
    case.edit(lambda content: [entry.update(name=entry["name"] + "s") for entry in content["categories"]])
    said = refused(*arguments)
    assert "squares" in said
    assert "was trained on square, bar" in said
    assert "--other-classes" in said
    assert main([*map(str, arguments), "--other-classes"]) == 0
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {entry["category_id"] for entry in found} == {3}, "by position"


@pytest.mark.usefixtures("stub")
def test_no_input_is_replaced(
    case: Case, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = case.train.parent / "images"
    before = {path: path.read_bytes() for path in images.iterdir()}
    arguments = ("predict", "--config-file", case.config, "--output")
    assert "001.png" in refused(*arguments, images, images)
    monkeypatch.chdir(images)
    assert "[replaced-file]" in refused(*arguments, ".", images / "003.png")
    assert main(["predict", *map(str, arguments[1:]), ".", "--no-pictures", str(images / "003.png")]) == 0
    (images / "predictions.json").unlink()
    truth = images / "images.json"
    truth.write_text(case.train.read_text())
    assert "images.json" in refused(*arguments, images, "--annotations", truth, case.val.parent / "images")
    truth.unlink()
    before[images / "001.jpg"] = before[images / "001.png"]
    (images / "001.jpg").write_bytes(before[images / "001.jpg"])
    case.edit(lambda content: content["images"][0].update(file_name="001.jpg"))
    assert "001.png" in refused(*arguments, images, "--annotations", case.train, images)
    video = tmp_path / "own.mp4"
    video.write_bytes(b"a video")
    assert "own.mp4" in refused(*arguments, tmp_path, video)
    assert {path: path.read_bytes() for path in images.iterdir()} == before
    assert video.read_bytes() == b"a video"


@pytest.mark.usefixtures("stub")
def test_pictures_stand_as_their_annotations_say(case: Case, tmp_path: Path) -> None:
    """Of a tag that the annotation tool ignored, predict thinks as train and eval do."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(case.train.parent / "images" / "001.png") as picture:
        picture.save(tmp_path / "001.jpg", exif=exif, quality=95)
    case.edit(lambda content: content["images"][0].update(file_name="001.jpg"))
    arguments = ("--annotations", case.train, tmp_path / "001.jpg")
    assert predict(case, tmp_path / "out", *arguments) == 0
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    assert found[0]["segmentation"]["size"] == [64, 80]
    assert predict(case, tmp_path / "turned", tmp_path / "001.jpg") == 0
    found = json.loads((tmp_path / "turned/predictions.json").read_text())
    assert found[0]["segmentation"]["size"] == [80, 64]
    Image.new("RGB", (40, 32)).save(tmp_path / "001.jpg")
    assert predict(case, tmp_path / "resized", *arguments) == 1


def test_an_image_that_the_predictor_refuses_is_named_and_the_others_are_done(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an exported detector refuses thin images."""

    class Fussy(Stub):
        def __call__(self, image: np.ndarray) -> Detections:
            if min(image.shape[:2]) < 8:
                raise UserError("thin-image", "too thin")
            return super().__call__(image)

    monkeypatch.setattr("gn_detect.engine.Predictor", Fussy)
    images = case.train.parent / "images"
    Image.new("RGB", (80, 1)).save(images / "002.png")
    assert predict(case, tmp_path / "out", "--workers", 0, images) == 1
    assert f"error: {images / '002.png'}: too thin" in capsys.readouterr().err
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["image_id"] for entry in found] == [1, 3, 4]


class Hungry(Stub):
    """A GPU that is too small for wide images."""

    def __call__(self, image: np.ndarray) -> Detections:
        if image.shape[1] > 80:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().__call__(image)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_too_large_for_the_gpu_is_named_and_the_others_are_done(
    case: Case, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    emptied = []
    monkeypatch.setattr("gn_detect.engine.Predictor", Hungry)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    images = case.train.parent / "images"
    Image.new("RGB", (90, 40)).save(images / "002.png")
    assert predict(case, tmp_path / "out", "--workers", workers, images) == 1
    error = capsys.readouterr().err
    assert f"error: {images / '002.png'}: out of GPU memory with an image of 90 x 40 pixels; " in error
    for key in (
        "INPUT.MAX_SIZE_TEST",
        "INPUT.MIN_SIZE_TEST",
        "TEST.DETECTIONS_PER_IMAGE",
        "MODEL.DEVICE cpu",
    ):
        assert key in error
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["image_id"] for entry in found] == [1, 3, 4]
    assert emptied == [True]


def test_masks_below_the_threshold_are_left_out_without_a_copy(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a large image are several GB."""
    made, written = [], []

    class Watched(Stub):
        def __call__(self, image: np.ndarray) -> Detections:
            made.append(super().__call__(image))
            return made[-1]

    def note(found: Detections, *rest: Any) -> list[dict[str, Any]]:
        written.append(found)
        return detections_to_coco(found, *rest)

    monkeypatch.setattr("gn_detect.engine.Predictor", Watched)
    monkeypatch.setattr(prediction, "detections_to_coco", note)
    assert predict(case, tmp_path / "out", "--workers", 0, case.train.parent / "images/001.png") == 0
    assert len(made[0]) == 2
    assert len(written[0]) == 1
    assert written[0].masks.data_ptr() == made[0].masks.data_ptr()


def write_video(path: Path, frames: int, size: tuple[int, int] = (49, 65)) -> list[int]:
    """A bright square that moves by 4 pixels a frame on black; returns its left sides."""
    from gn_detect.data.video import VideoWriter

    lefts = []
    with path.open("wb") as file:
        writer = VideoWriter(file, path)
        for number in range(frames):
            picture = np.zeros((*size, 3), dtype=np.uint8)
            lefts.append(4 + 4 * number)
            picture[16:32, lefts[-1] : lefts[-1] + 16] = 255
            writer.add(picture, number / 10)
        writer.end()
    return lefts


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("workers", [0, 1])
def test_videos_are_drawn_and_listed_frame_by_frame(case: Case, tmp_path: Path, workers: int) -> None:
    av = pytest.importorskip("av", reason="needs PyAV, the extra 'video'")
    source, output = tmp_path / "clip.mp4", tmp_path / "out"
    lefts = write_video(source, 8)
    assert predict(case, output, "--workers", workers, source) == 0
    assert sorted(path.name for path in output.iterdir()) == ["clip.jsonl", "clip.mp4"]
    lines = [json.loads(line) for line in (output / "clip.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(8))
    assert [line["time"] for line in lines] == pytest.approx([i / 10 for i in range(8)], abs=1e-3)
    for line, left in zip(lines, lefts, strict=True):
        (found,) = line["objects"]
        assert found["bbox"][0] == pytest.approx(left, abs=1.5)
        assert found["category_id"] == 3
    with av.open(str(output / "clip.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        times = [frame.time for frame in av.open(str(output / "clip.mp4")).decode(video=0)]
    assert len(frames) == 8
    assert len({frame.shape for frame in frames}) == 1
    assert times == pytest.approx([i / 10 for i in range(8)], abs=1e-3)
    assert frames[0].shape[0] >= 480, "small videos are enlarged as images are"
    assert (np.ptp(frames[0].astype(int), axis=-1) > 60).any(), "something is drawn in colour"


@pytest.mark.usefixtures("stub")
def test_a_damaged_video_is_named_and_the_others_are_done(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av", reason="needs PyAV, the extra 'video'")
    folder, output = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    write_video(folder / "b.mp4", 3)
    (folder / "a.mp4").write_bytes(b"no video at all")
    assert predict(case, output, folder) == 1
    error = capsys.readouterr().err
    assert "cannot read video" in error
    assert "a.mp4" in error
    assert "1 of 2 inputs" in error
    assert sorted(path.name for path in output.iterdir()) == ["b.jsonl", "b.mp4"]


def test_a_video_that_is_too_large_for_the_gpu_is_named(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av", reason="needs PyAV, the extra 'video'")
    monkeypatch.setattr("gn_detect.engine.Predictor", Hungry)
    folder, output = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    write_video(folder / "a.mp4", 2, (48, 96))
    write_video(folder / "b.mp4", 2, (48, 64))
    assert predict(case, output, folder) == 1
    error = capsys.readouterr().err
    assert (
        f"error: out of GPU memory with frame 0 of {folder / 'a.mp4'}, of 96 x 48 pixels; lower INPUT"
        in error
    )
    assert sorted(path.name for path in output.iterdir()) == ["b.jsonl", "b.mp4"]


@pytest.mark.usefixtures("stub")
def test_without_pyav_the_remedy_is_named(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clip.mov").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    assert predict(case, tmp_path / "out", tmp_path / "clip.mov") == 1
    error = capsys.readouterr().err
    assert "clip.mov" in error
    assert "pip install av" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("stub")
def test_a_list_of_other_files_is_no_video(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    write_video(tmp_path / "secret.mp4", 2)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "play.mp4").write_text(playlist)
    for name in ("list.mp4", "play.mp4"):
        assert predict(case, tmp_path / "out", "--workers", 0, tmp_path / name) == 1
        assert f"cannot read video {tmp_path / name}" in capsys.readouterr().err
