"""The Python API: fine-tuning, predictors of weights alone, and what their detections offer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import gn_detect
from gn_detect.config import dump_config, load_config, without_paths
from gn_detect.engine.image_detections import ImageDetections
from gn_detect.weights import norm_settings, save_weights
from tests.engine.tiny import make_dataset, write_config
from tests.test_docs import SMALL_MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a config, an untrained checkpoint without one, ``photo.png`` and data."""
    folder = tmp_path_factory.mktemp("api")
    train = make_dataset(folder / "train", 2, seed=1)
    config = folder / "config.yaml"
    shutil.move(write_config(folder, train), config)
    cfg = load_config(config)
    torch.manual_seed(3)
    model = gn_detect.build_model(cfg)
    names = {"class_names": ["square", "bar"], "category_ids": [3, 7]}
    save_weights(folder / "model_best.pth", model.state_dict(), replace(norm_settings(model), **names))
    shutil.copy(train.parent / "images/001.png", folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def predictor(folder: Path) -> gn_detect.Predictor:
    return gn_detect.Predictor.from_pretrained(folder)


@pytest.fixture(scope="module")
def found(predictor: gn_detect.Predictor, folder: Path) -> ImageDetections:
    found = predictor(folder / "photo.png")
    assert len(found) > 3
    assert len(found.labels.unique()) == 2
    return found


def same(one: gn_detect.Detections, other: gn_detect.Detections) -> bool:
    assert one.masks is not None
    assert other.masks is not None
    pairs = (one.boxes, other.boxes), (one.scores, other.scores), (one.labels, other.labels)
    return all(torch.equal(a, b) for a, b in (*pairs, (one.masks, other.masks)))


def test_every_kind_of_image_gives_the_same(
    predictor: gn_detect.Predictor, found: ImageDetections, folder: Path
) -> None:
    path = folder / "photo.png"
    picture = Image.open(path)
    pixels = np.array(picture)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (str(path), picture, picture.convert("RGBA"), pixels, tensor):
        assert same(predictor(image), found)
    several = predictor([path, pixels, tensor])
    assert [type(one) for one in several] == [ImageDetections] * 3
    assert all(same(one, found) for one in several)
    assert predictor([]) == []
    assert isinstance(found, gn_detect.Detections)
    assert np.array_equal(found.image, pixels)
    assert found.category_ids == [3, 7]


def test_grey_and_turned_images(predictor: gn_detect.Predictor, folder: Path, tmp_path: Path) -> None:
    grey = Image.open(folder / "photo.png").convert("L")
    three = np.repeat(np.array(grey)[:, :, None], 3, axis=2)
    expected = predictor(three)
    deep = Image.fromarray(np.array(grey).astype(np.uint16) << 8)
    for image in (np.array(grey), grey, deep):
        assert same(predictor(image), expected)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = tmp_path / "turned.png"
    Image.open(folder / "photo.png").save(turned, exif=exif)
    opened = Image.open(turned)
    assert same(predictor(opened), predictor(turned))
    assert predictor(turned).image.shape == (80, 64, 3)


@pytest.mark.parametrize(
    "image",
    [
        None,
        7,
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 4, 4),
        torch.zeros(4, 4, dtype=torch.uint8),
    ],
)
def test_what_is_no_image_is_refused_with_what_is(predictor: gn_detect.Predictor, image: Any) -> None:
    with pytest.raises(ValueError, match=r"^image must be a path, a PIL image, a uint8 array"):
        predictor(image)


def test_a_picture_of_floats_is_refused(predictor: gn_detect.Predictor) -> None:
    with pytest.raises(gn_detect.UserError, match="floating-point pixels; convert it to 8 bits"):
        predictor(Image.new("F", (64, 64)))


def test_objects_are_chosen_by_mask_slice_and_position(found: ImageDetections) -> None:
    high = found[found.scores >= found.scores[1]]
    assert same(high, found[:2])
    assert same(high, found[[0, 1]])
    assert same(found[1], found[1:2])
    assert same(found[np.int64(1)], found[1:2])
    assert same(high, found[(found.scores >= high.scores[1]).numpy()])
    assert same(high, found[np.array([0, 1])])
    assert same(high, found[torch.tensor([0, 1])])
    assert high.image is found.image
    assert high.class_names == ["square", "bar"]
    assert len(found[:0]) == 0 == len(found[[]])
    assert len(list(found)) == len(found)
    with pytest.raises(IndexError):
        found[len(found)]


def test_the_repr_is_one_line_that_counts_classes(found: ImageDetections) -> None:
    few = found[[int((found.labels == label).nonzero()[0]) for label in (0, 1)] * 2]
    few = few[[0, 1, 3]]
    assert repr(few) == "ImageDetections(3 objects: 1 square, 2 bar)"
    assert repr(found[:0]) == "ImageDetections(0 objects)"
    few.class_names = ["square\n\x1b[2J", "bar"]
    assert repr(few).isprintable()
    plain = gn_detect.Detections(few.boxes, few.scores, few.labels)
    assert repr(plain) == "Detections(3 objects: 1 of class 0, 2 of class 1)"


def test_pictures_are_saved_and_shown(found: ImageDetections, tmp_path: Path) -> None:
    few = found[:2]
    few.save(tmp_path / "out.png")
    picture = few.plot()
    assert np.array_equal(np.array(picture), np.array(Image.open(tmp_path / "out.png")))
    assert not np.array_equal(np.array(picture), np.array(few[:0].plot()))
    with pytest.raises(gn_detect.UserError, match=r"out.txt: its name must end in \.png"):
        few.save(tmp_path / "out.txt")


def test_detections_as_coco_results(found: ImageDetections) -> None:
    import pycocotools.mask as coco_mask

    entries = found.to_coco(image_id=12)
    json.dumps(entries)
    assert [entry["image_id"] for entry in entries] == [12] * len(found)
    assert {entry["category_id"] for entry in entries} == {3, 7}
    assert found.masks is not None
    assert np.array_equal(coco_mask.decode(entries[0]["segmentation"]), found.masks[0].numpy())


def test_detections_as_a_table(found: ImageDetections, monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas itself where it is installed; else a stand-in, which takes the same columns."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(gn_detect.UserError, match="pip install pandas"):
        found.to_pandas()
    monkeypatch.undo()
    try:
        import pandas  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    for few in (found, found[:0]):
        table = few.to_pandas()
        assert list(table) == ["class_name", "category_id", "score", "x1", "y1", "x2", "y2", "area"]
        assert list(table["class_name"]) == [few.class_names[label] for label in few.labels]
        assert {*table["category_id"]} <= {3, 7}
        boxes = np.stack([table[name] for name in ("x1", "y1", "x2", "y2")], axis=1)
        assert np.array_equal(boxes, few.boxes.numpy())
        assert few.masks is not None
        assert list(table["area"]) == [int(mask.sum()) for mask in few.masks]
    few.masks = None
    assert "area" not in few.to_pandas()


def test_detections_for_supervision(found: ImageDetections, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in takes the place of the package, which the tests do not install."""
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(gn_detect.UserError, match="pip install supervision"):
        found.to_supervision()
    stand_in = SimpleNamespace(Detections=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    for few in (found, found[:0]):
        given = few.to_supervision()
        assert given.xyxy.shape == (len(few), 4)
        assert given.mask.shape == (len(few), 64, 80)
        assert given.mask.dtype == bool
        assert given.class_id.tolist() == few.labels.tolist()
        assert given.confidence.tolist() == few.scores.tolist()
        assert given.data["class_name"].tolist() == [few.class_names[i] for i in few.labels]


def test_a_model_is_called_for_losses_and_for_detections(folder: Path) -> None:
    cfg = load_config(folder / "config.yaml")
    model = gn_detect.build_model(cfg)
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2
    target = gn_detect.structures.Target(
        torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([0]), [[np.array([8.0, 8, 40, 8, 40, 40])]]
    )
    assert set(model.train()(images, [target] * 2)) >= {"loss_cls", "loss_mask"}
    found = model.eval()(images)
    assert len(found) == 2
    assert all(isinstance(one, gn_detect.Detections) for one in found)
    with pytest.raises(ValueError, match=r"needs targets; call model.eval\(\)"):
        model.train()(images)


# Weights alone


def copy_of(source: Path, target: Path, **metadata: Any) -> Path:
    """The checkpoint in another place, with other metadata."""
    content = gn_detect.weights.read_checkpoint(source)
    save_weights(target, content.tensors, replace(content.metadata, **metadata))
    return target


def test_a_config_inside_the_file_is_enough(
    folder: Path, found: ImageDetections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dump_config(without_paths(load_config(folder / "config.yaml")))
    path = copy_of(folder / "model_best.pth", tmp_path / "elsewhere.pth", config=config)
    predictor = gn_detect.Predictor.from_pretrained(path, {"TEST.DETECTIONS_PER_IMAGE": 2})
    assert same(predictor(folder / "photo.png"), found[:2])
    assert predictor.cfg.model.weights == str(path)
    monkeypatch.chdir(tmp_path)
    assert same(gn_detect.Predictor.from_pretrained("elsewhere.pth")(folder / "photo.png"), found)


def test_the_paths_of_the_run_are_kept_where_its_config_is_that_of_the_file(
    folder: Path, tmp_path: Path
) -> None:
    cfg = load_config(folder / "config.yaml")
    shutil.copy(folder / "config.yaml", tmp_path)
    path = copy_of(folder / "model_best.pth", tmp_path / "a.pth", config=dump_config(without_paths(cfg)))
    assert gn_detect.Predictor.from_pretrained(path).cfg.datasets == cfg.datasets
    other = dump_config(without_paths(cfg.replace({"TEST.DETECTIONS_PER_IMAGE": 3})))
    copy_of(path, tmp_path / "b.pth", config=other)
    found = gn_detect.Predictor.from_pretrained(tmp_path / "b.pth").cfg
    assert found.test.detections_per_image == 3
    gpu = dump_config(without_paths(cfg.replace({"MODEL.DEVICE": "cuda:7"})))
    copy_of(path, tmp_path / "gpu.pth", config=gpu)
    assert gn_detect.Predictor.from_pretrained(tmp_path / "gpu.pth").cfg.model.device == "auto"
    (tmp_path / "config.yaml").write_text("UNKNOWN: 1")
    assert gn_detect.Predictor.from_pretrained(path).cfg.datasets != cfg.datasets
    copy_of(folder / "model_best.pth", tmp_path / "c.pth")
    with pytest.raises(gn_detect.UserError, match=r"config.yaml: UNKNOWN: unknown key"):
        gn_detect.Predictor.from_pretrained(tmp_path / "c.pth")


def test_tensors_imply_a_config_where_nothing_holds_one(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_of(folder / "model_best.pth", tmp_path / "alone.pth")
    predictor = gn_detect.Predictor.from_pretrained(path, {"MODEL.DEVICE": "cpu"})
    model = predictor.cfg.model
    assert model.roi_heads.num_classes == 2
    assert model.mask_on
    assert model.gn.num_groups == 4
    assert model.resnets.depth == 18
    assert model.fpn.out_channels == 16
    assert not model.resnets.stride_in_1x1
    assert "alone.pth holds no config: the network comes from its tensors" in caplog.text
    assert len(predictor(folder / "photo.png").class_names) == 2


def test_a_run_s_folder_gives_its_best_checkpoint_or_the_newest(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.yaml", tmp_path)
    with pytest.raises(gn_detect.UserError, match="holds no checkpoint; give the folder of a run or a"):
        gn_detect.Predictor.from_pretrained(tmp_path)
    for name in ("model_0000001.pth", "model_final.pth", "model_best.pth"):
        copy_of(folder / "model_best.pth", tmp_path / name)
        (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
        used = gn_detect.Predictor.from_pretrained(tmp_path, {"MODEL.DEVICE": "cpu"}).cfg.model.weights
        assert Path(used).name == name


def test_weights_that_fit_no_config_are_refused_with_a_remedy(tmp_path: Path, folder: Path) -> None:
    tensors = gn_detect.weights.read_checkpoint(folder / "model_best.pth").tensors
    backbone = {name: value for name, value in tensors.items() if name.startswith("backbone.bottom_up")}
    save_weights(tmp_path / "backbone.pth", backbone)
    with pytest.raises(gn_detect.UserError, match="is a backbone R-18 .* gn-detect train --weights"):
        gn_detect.Predictor.from_pretrained(tmp_path / "backbone.pth")
    save_weights(tmp_path / "other.pth", {"weight": torch.zeros(3)})
    with pytest.raises(gn_detect.UserError, match="no ResNet .* can be recognised in it .* other weights"):
        gn_detect.Predictor.from_pretrained(tmp_path / "other.pth")
    for name in ("no/such/file.pth", "mask-R-50-FPN-GN-3"):
        with pytest.raises(gn_detect.UserError, match="no such file; check MODEL.WEIGHTS, or give zoo://"):
            gn_detect.Predictor.from_pretrained(name)


@pytest.mark.parametrize("name", ["mask-R-50-FPN-GN-3x", "zoo://mask-R-50-FPN-GN-3x"])
def test_a_model_of_the_zoo_needs_no_scheme(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded: a file that is no checkpoint lies in the cache."""
    monkeypatch.setenv("GN_DETECT_CACHE", str(tmp_path))
    file = gn_detect.weights.zoo.find_entry(name).file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    with pytest.raises(gn_detect.UserError, match=f"{file.name} as a pickle: a malformed pickle"):
        gn_detect.Predictor.from_pretrained(name)


def test_a_wrong_key_is_named(folder: Path) -> None:
    with pytest.raises(gn_detect.UserError, match="MODEL.DEVISE: unknown key; did you mean MODEL.DEVICE"):
        gn_detect.Predictor.from_pretrained(folder, {"MODEL.DEVISE": "cpu"})


# Fine-tuning


def test_finetune_gives_a_predictor_results_reasons_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = make_dataset(tmp_path / "train", 2, seed=1), make_dataset(tmp_path / "val", 2, seed=2)
    overrides = dict(zip(SMALL_MODEL[::2], SMALL_MODEL[1::2], strict=True))
    run = gn_detect.finetune(
        train,
        train.parent / "images",
        val_json=val,
        val_images=str(val.parent / "images"),
        output_dir=tmp_path / "run",
        overrides={**overrides, "SOLVER.MAX_ITER": 1, "INPUT.MIN_SIZE_TRAIN": [64], "SEED": 3},
    )
    assert isinstance(run, gn_detect.FineTuned)
    assert run.folder == tmp_path / "run"
    assert set(run.results) == {"bbox", "segm", "diagnosis", "validation"}
    assert 0 <= run.results["bbox"]["AP"] <= 100
    assert run.config.solver.max_iter == 1
    assert run.config.model.roi_heads.num_classes == 2
    assert run.reasons["classes"] == "2 in annotations.json: square, bar"
    assert run.reasons["schedule"].startswith("SOLVER.MAX_ITER as given")
    printed = capsys.readouterr().out
    assert "chosen for 2 images, 4 objects and CPU" in printed
    assert "anchors: " in printed
    found = run.predictor([val.parent / "images/001.png"])
    assert run.predictor.class_names == ["square", "bar"]
    assert found[0].category_ids == [3, 7]
    assert run.predictor.cfg.model.weights == str(run.folder / "model_best.pth")
    assert run.report() == run.folder / "report.html"
    assert (run.folder / "report.html").is_file()
    stored = json.loads((run.folder / "results.json").read_text())
    assert stored["bbox"]["AP"] == run.results["bbox"]["AP"]

    again = gn_detect.finetune(
        train,
        train.parent / "images",
        weights=run.folder / "model_final.pth",
        output_dir=tmp_path / "again",
        overrides={"SOLVER.MAX_ITER": 1, "MODEL.DEVICE": "cpu", "VIS.NUM_IMAGES": 0},
    )
    assert again.results == {}
    assert again.config.model.fpn == run.config.model.fpn
    assert again.predictor.cfg.model.weights == str(again.folder / "model_final.pth")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"val_json": "val.json"}, "val_json and val_images belong together; give both"),
        ({"train_images": "nowhere"}, "images folder nowhere is missing"),
        ({"train_json": "nothing.json"}, "nothing.json"),
        ({"overrides": {"SOLVER.MAX_ITR": 1}}, "SOLVER.MAX_ITR: unknown key; did you mean SOLVER.MAX_ITER"),
        ({"overrides": {"SOLVER.MAX_ITER": "many"}}, "SOLVER.MAX_ITER: 'many' does not fit"),
        ({"weights": "nothing.pth"}, "nothing.pth: no such file"),
    ],
)
def test_finetune_refuses_in_one_line(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    train = make_dataset(tmp_path / "train", 1)
    given = {"train_json": train, "train_images": train.parent / "images", "output_dir": tmp_path / "run"}
    with pytest.raises(gn_detect.UserError, match=complaint) as caught:
        gn_detect.finetune(**{**given, **changes})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# The package


def test_every_public_name_and_folder_is_there_after_a_light_import() -> None:
    code = "import sys, gn_detect; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(gn_detect, name) is not None for name in gn_detect.__all__)
    assert callable(gn_detect.report.write_report)
    assert callable(gn_detect.finetune)
    folders = {path.parent.name for path in Path(gn_detect.__file__).parent.glob("*/__init__.py")}
    assert folders - {"cli"} <= set(gn_detect.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gn_detect.nothing


def test_the_page_speaks_of_names_that_exist(repository: Path) -> None:
    text = (repository / "docs" / "python.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "docs/python.md", "exec")
    for name in re.findall(r"gn_detect\.([\w.]+\w)", text):
        found: Any = gn_detect
        for part in name.split("."):
            found = getattr(found, part)
    for name in re.findall(r"found\.(\w+)|sure\.(\w+)", text):
        names = {*vars(ImageDetections), *ImageDetections.__dataclass_fields__}
        assert set(filter(None, name)) <= names
