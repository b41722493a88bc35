"""The catalogue: each entry from its name to a model, and the ways to name it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import gn_detect
from gn_detect import UserError
from gn_detect.config import Config
from gn_detect.structures import Detections
from gn_detect.weights import implied_keys, load_weights, read_checkpoint
from gn_detect.weights.zoo import ZooEntry, entry_of, find_entry, read_catalog, resolve
from tests.refusal import refusal

from . import published

SMALL = [
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.GN.NUM_GROUPS", "4",
    "MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
]  # fmt: skip
FEW = [
    "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "10",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "INPUT.MIN_SIZE_TEST", "96",
]  # fmt: skip
NAMES = list(read_catalog())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, so that no test downloads or finds what another one left."""
    monkeypatch.setenv("GN_DETECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The URLs that would have been fetched."""
    asked: list[str] = []

    def refuse(url: str, *args: object, **kwargs: object) -> None:
        asked.append(url)
        raise UserError("download-failed", f"no network: {url}")

    monkeypatch.setattr("gn_detect.weights.zoo.download", refuse)
    return asked


def config_of(entry: ZooEntry, *keys: str) -> Config:
    weights = ["MODEL.WEIGHTS", f"zoo://{entry.name}"]
    return gn_detect.load_config(entry.config, [*entry.overrides, *FEW, *weights, *keys])


def build(cfg: Config) -> torch.nn.Module:
    torch.manual_seed(1)
    return gn_detect.build_model(cfg).eval()


def detect(model: torch.nn.Module, cfg: Config) -> Detections:
    """In one picture of noise."""
    predictor = gn_detect.Predictor.__new__(gn_detect.Predictor)
    predictor.model, predictor.cfg, predictor.class_names, predictor.category_ids = model, cfg, [], []
    return predictor(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))


def check_entry(entry: ZooEntry, cfg: Config, least: int = 10) -> None:
    """From the name to a model: all is matched, and ``least`` detections are those of the same values."""
    own = build(cfg)
    state = published.values_for(entry, own)
    published.write(entry, cfg, state)
    if entry.kind == "backbone":
        plain = cfg.replace({"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False] * 4})  # no classifier has offsets
        backbone = build(plain).backbone
        report = load_weights(getattr(backbone, "bottom_up", backbone), f"zoo://{entry.name}")
        assert not report.missing
        assert not report.unexpected
        assert not report.mismatched
        assert not [name for name in report.ignored if not name.endswith("num_batches_tracked")]
        state = {**own.state_dict(), **published.schemes.backbone_of(state)}
    own.load_state_dict(state)
    model = build(cfg)
    training = entry.kind == "backbone"
    report = load_weights(model, cfg.model.weights, for_training=training, config=cfg)
    assert report.scheme == entry.scheme
    assert not report.unexpected
    assert not report.mismatched
    assert training or not report.missing
    fresh = ("backbone.fpn", "proposal", "roi_heads")
    assert all(name.startswith(fresh) or ".conv2_offset." in name for name in report.missing)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    expected, found = detect(own, cfg), detect(model, cfg)
    assert len(expected.boxes) >= least
    for part in ("boxes", "scores", "labels", *(["masks"] if cfg.model.mask_on else [])):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part


KINDS = {(entry.scheme, entry.kind): name for name, entry in read_catalog().items()}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in KINDS.values() else pytest.mark.slow) for name in NAMES],
)
def test_from_the_name_to_a_model(name: str) -> None:
    entry = find_entry(name)
    groups = ["MODEL.RESNETS.WIDTH_PER_GROUP", "1"] if "-X-" in name else []
    check_entry(entry, config_of(entry, *SMALL, *groups))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_from_the_name_to_a_model_of_full_size(name: str) -> None:
    entry = find_entry(name)
    check_entry(entry, config_of(entry), least=1)  # so deep, random values leave few distinct boxes
    print(f"{name}: {entry.file.stat().st_size / 1e6:.0f} MB")
    entry.file.unlink()


def test_every_entry_is_whole(no_downloads: list[str]) -> None:
    """Its config loads and agrees with what is known of the file; nothing is fetched to tell."""
    files = {entry.file for entry in read_catalog().values()}
    assert len(files) == len(NAMES) == 64
    for entry in read_catalog().values():
        cfg = gn_detect.load_config(entry.config, entry.overrides)
        assert cfg.input.format in ("BGR", "RGB")
        assert entry.licence
        assert entry.source.startswith("https://")
        assert (entry.box_ap is None) == (entry.kind == "backbone")
        assert (entry.mask_ap is None) == (entry.kind == "backbone" or not cfg.model.mask_on)
        facebook = "fbaipublicfiles" in entry.url
        assert not facebook or entry.licence == "CC BY-SA 3.0"
        if facebook:
            assert entry.checksum == ("md5-url" if "/detectron/" in entry.url else "")
        elif entry.scheme == "BiT":
            assert entry.checksum == ""
        elif entry.scheme == "tensorpack":
            assert (entry.checksum, entry.bytes is not None) == ("", True)
        else:  # the name ends with the first digits
            assert entry.checksum == "sha256:" + entry.url.rpartition("-")[2].removesuffix(".pth")
    assert no_downloads == []


NAMED = {
    "zoo://R-50-GN": "R-50-GN",
    "zoo:/R-50-GN": "R-50-GN",  # as pathlib writes it
    "catalog://ImageNetPretrained/FAIR/R-50-GN": "R-50-GN",
    "catalog://ImageNetPretrained/MSRA/R-101": "MSRA-R-101",
    "catalog://Caffe2Detectron/COCO/48616381/e2e_mask_rcnn_R-50-FPN_2x_gn": "Detectron-mask-R-50-FPN-GN-2x",
    "detectron2://ImageNetPretrained/MSRA/R-50.pkl": "MSRA-R-50",
    "detectron2://Misc/mask_rcnn_R_50_FPN_3x_gn/138602888/model_final_dc5d9e.pkl": "mask-R-50-FPN-GN-3x",
    "https://download.openmmlab.com/pretrain/third_party/resnet50_gn-9186a21c.pth": "mmdetection-R-50-GN",
}


@pytest.mark.parametrize("text", NAMED)
def test_names_that_mean_an_entry(text: str, no_downloads: list[str]) -> None:
    entry = find_entry(NAMED[text])
    assert entry_of(text) == entry == entry_of(Path(text))
    with pytest.raises(UserError):
        resolve(text)
    assert no_downloads == [entry.url]
    entry.file.parent.mkdir(parents=True)
    entry.file.write_bytes(b"put there by hand")
    assert resolve(text) == entry.file
    assert entry_of(entry.file) == entry
    assert len(no_downloads) == 1


def test_other_files_of_detectron2(no_downloads: list[str], cache: Path) -> None:
    with pytest.raises(UserError):
        resolve("detectron2://Misc/other%3Athing/../model.pkl")
    assert no_downloads == ["https://dl.fbaipublicfiles.com/detectron2/Misc/other%3Athing/../model.pkl"]
    entry = find_entry("Detectron-mask-R-50-FPN-GN-2x")
    assert cache in entry.file.parents
    assert "coco_2014_train_coco_2014" in str(entry.file)


TWINS = [
    ("https://drive.example.com/download?id=AAA", "https://drive.example.com/download?id=BBB"),
    ("https://example.com/a:b/model.pth", "https://example.com/a_b/model.pth"),
    ("https://example.com/a%3Fb/model.pth", "https://example.com/a_b/model.pth"),
    ("https://example.com/a%2Fb/model.pth", "https://example.com/a/b/model.pth"),
    ("https://example.com/a/../model.pth", "https://example.com/a/model.pth"),
    ("https://example.com:8443/model.pth", "https://example.com/model.pth"),
    ("https://example.com/?id=AAA", "https://example.com"),
]


@pytest.mark.parametrize(("first", "second"), TWINS)
def test_no_two_urls_share_a_file(
    first: str, second: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the part that is left of a broken download."""

    def write_url(url: str, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(url)
        return target

    monkeypatch.setattr("gn_detect.weights.zoo.download", write_url)
    for url in (first, second, first):
        file = resolve(url)
        assert file.read_text() == url
        assert cache in file.parents
        assert file.suffix == ".pth" or "model" not in url


def test_a_plain_url_keeps_its_place(cache: Path) -> None:
    """So that what was downloaded before is found."""
    file = cache / "example.com/some/model.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"put there by hand")
    assert resolve("https://example.com/some/model.pth") == file


def test_the_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    entry = find_entry("zoo://R-50-GN")
    assert entry.file == cache / "dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47261647/R-50-GN.pkl"
    monkeypatch.delenv("GN_DETECT_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert entry.file.is_relative_to("/home/somebody/.cache/gn_detect")


def test_every_weights_key_of_the_configs_is_known(repository: Path, no_downloads: list[str]) -> None:
    for path in sorted((repository / "configs").rglob("*.yaml")):
        weights = gn_detect.load_config(path).model.weights
        assert not weights or entry_of(weights) is not None, path
    assert no_downloads == []


def test_a_file_of_the_zoo_brings_its_convention(no_downloads: list[str]) -> None:
    """detectron2's files do not tell that the 9x model has its own deviations: the catalogue does."""
    entry = find_entry("mask-R-50-FPN-GN-scratch-9x")
    cfg = config_of(entry, *SMALL)
    published.write(entry, cfg, published.values_for(entry, build(cfg)))
    other = cfg.replace({"MODEL.PIXEL_STD": [1.0, 1.0, 1.0]})
    for name in (f"zoo://{entry.name}", str(entry.file)):
        with refusal("other-input", "--fix-config", "MODEL.PIXEL_STD '[57.375, 57.12"):
            load_weights(build(other), name, config=other)
        assert implied_keys(other, name) == {"MODEL.PIXEL_STD": [57.375, 57.12, 58.395]}
    assert read_checkpoint(entry.file).metadata.input.format == "BGR"
