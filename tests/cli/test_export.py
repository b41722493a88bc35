"""A detector as one file: it finds what the model finds, tells what it is, and is refused if unsafe."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gn_detect import load_config
from gn_detect.cli import main
from gn_detect.config import Config, dump_config
from gn_detect.engine import Predictor
from gn_detect.errors import UserError
from gn_detect.export import ExportedPredictor
from gn_detect.export import run as exported
from gn_detect.export import write as export
from gn_detect.export.parity import compare
from gn_detect.modeling import build_model
from gn_detect.weights import save_weights
from tests.engine.tiny import write_config

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

TWO_STAGES = [
    *("MODEL.RESNETS.OUT_FEATURES", "[res2, res3]", "MODEL.FPN.IN_FEATURES", "[res2, res3]"),
    *("MODEL.RPN.IN_FEATURES", "[p2, p3, p4]", "MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32]]"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "[p2, p3]"),
]
"""Keys of a network that PyTorch exports in half the time of one with four stages."""

SIZES = ((64, 80), (300, 240), (70, 100))
"""Height and width."""


def decided_weights(cfg: Config, path: Path, head: float = 0.5) -> None:
    """Random weights whose objects, boxes and masks are not all nearly the same."""
    torch.manual_seed(0)
    model = build_model(cfg)
    generator = torch.Generator().manual_seed(3)
    gains = {"cls_score": head, "objectness_logits": head, "bbox_pred": 0.02, "anchor_deltas": 0.02}
    gains |= {"mask_head.predictor": 1.0, "conv2_offset": 0.02}
    with torch.no_grad():
        for name, value in model.named_parameters():
            for part, gain in gains.items():
                if name.endswith(f"{part}.weight"):
                    value.copy_(gain * torch.randn(value.shape, generator=generator))
        if cfg.model.resnets.norm in ("FrozenBN", "SyncBN"):  # or the sums of residuals grow without bound
            for name, value in (*model.named_buffers(), *model.named_parameters()):
                if name.endswith("conv3.norm.weight"):
                    value.mul_(0.2)
    metadata = {"class_names": ["square", "bar"], "category_ids": [3, 7]}
    save_weights(path, model.state_dict(), metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, weights, images of several sizes, and the detector as ``model.pt2``."""
    folder = tmp_path_factory.mktemp("export")
    config = write_config(folder)
    config.write_text(dump_config(load_config(config, TWO_STAGES)))
    decided_weights(load_config(config), folder / "model.pth")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i, (height, width) in enumerate(SIZES):
        blocks = random.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR).save(
            folder / "images" / f"{i}.png"
        )
    export_to(folder, "model.pt2")
    return folder


@pytest.fixture(autouse=True, scope="module")
def programs_are_loaded_once() -> Iterator[None]:
    """PyTorch takes seconds to load a program; the same content gives the same one."""
    load, loaded = torch.export.load, dict[bytes, SimpleNamespace]()

    def once(path: Path) -> SimpleNamespace:
        content = path.read_bytes()
        if content not in loaded:
            module = load(path).module()
            loaded[content] = SimpleNamespace(module=lambda: module)
        return loaded[content]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "load", once)
        yield


def export_to(folder: Path, name: str) -> None:
    """Run the command."""
    words = ["export", "--config-file", folder / "tiny.yaml", "--output", folder / name]
    words += ["--check", folder / "images", "MODEL.WEIGHTS", folder / "model.pth"]
    assert main(list(map(str, words))) == 0


@pytest.fixture(scope="module")
def with_onnx(folder: Path) -> Path:
    """The folder with the detector as ``model.onnx``, too; PyTorch takes half a minute to make it."""
    export_to(folder, "model.onnx")
    return folder


@pytest.fixture(params=["model.pt2", pytest.param("model.onnx", marks=pytest.mark.slow)])
def name(request: pytest.FixtureRequest) -> str:
    """Name of the detector's file in the folder."""
    if request.param == "model.onnx":
        request.getfixturevalue("with_onnx")
    return str(request.param)


def test_the_file_finds_what_the_model_finds_at_every_size(folder: Path, name: str) -> None:
    cfg = load_config(folder / "tiny.yaml", ["MODEL.WEIGHTS", str(folder / "model.pth")])
    found = ExportedPredictor(folder / name, trust=True)
    parity = compare(Predictor(cfg), found, sorted((folder / "images").iterdir()))
    assert parity.within_tolerances and parity.detections > 20, str(parity)
    assert found.class_names == ["square", "bar"]
    assert found.category_ids == [3, 7]
    nothing = found._program(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([0, 0]))
    assert [tuple(t.shape) for t in nothing] == [(0, 4), (0,), (0,), (0, 14, 14)]


def test_the_result_as_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.pt2"
    monkeypatch.setattr(
        "gn_detect.export.write.export_detector", lambda _, path: shutil.copy(folder / "model.pt2", path)
    )
    words = ["export", "--json", "--config-file", folder / "tiny.yaml", "--output", copy]
    words += ["--check", folder / "images", "--weights", folder / "model.pth"]
    assert main(list(map(str, words))) == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["output"] == str(copy)
    assert reported["bytes"] == copy.stat().st_size
    assert reported["parity"]["within_tolerances"]
    assert reported["parity"]["images"] == len(SIZES)


def test_an_image_that_the_file_cannot_take_is_named_and_the_others_are_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (120, 40)).save(tmp_path / "flat.png")
    words = ["predict", "--model", folder / "model.pt2", "--trust", "--output", tmp_path / "out"]
    words += [tmp_path / "flat.png", folder / "images"]
    assert main(list(map(str, words))) == 1
    message = capsys.readouterr().err
    assert f"error: {tmp_path / 'flat.png'}: 120 x 40 pixels" in message
    assert "needs sides of 64" in message
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())["images"]) == len(SIZES)


def test_predict_with_the_file_writes_what_predict_with_the_config_writes(
    folder: Path, name: str, tmp_path: Path
) -> None:
    sources = {
        "eager": ["--config-file", folder / "tiny.yaml", "MODEL.WEIGHTS", folder / "model.pth"],
        "file": ["--model", folder / name, "--trust"],
    }
    found = {}
    for source, (flag, value, *keys) in sources.items():
        words = ["predict", flag, value, "--output", tmp_path / source, "--threshold", 0.3]
        assert main([str(word) for word in [*words, folder / "images", *keys]]) == 0
        found[source] = json.loads((tmp_path / source / "predictions.json").read_text())
    assert len(found["eager"]) == len(found["file"]) > 0
    for a, b in zip(found["eager"], found["file"], strict=True):
        assert (a["file_name"], a["category_id"]) == (b["file_name"], b["category_id"])
        assert a["bbox"] == pytest.approx(b["bbox"], abs=0.05)
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)


@pytest.mark.slow
def test_the_onnx_file_is_self_contained_and_tells_what_it_is(with_onnx: Path) -> None:
    model = onnx.load(with_onnx / "model.onnx")
    reported = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(reported["class_names"]) == ["square", "bar"]
    assert json.loads(reported["category_ids"]) == [3, 7]
    assert json.loads(reported["pixel_mean"]) == [103.53, 116.28, 123.675]
    assert reported["input_format"] == "BGR"
    assert "FPN" in reported["config"]
    assert reported["gn_detect_version"]
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    assert len(model.functions) == 0
    assert "GroupNormalization" in {node.op_type for node in model.graph.node} or any(
        node.op_type == "InstanceNormalization" for node in model.graph.node
    )
    height, width = model.graph.input[0].type.tensor_type.shape.dim[2:]
    assert height.dim_param
    assert width.dim_param


def test_the_file_names_no_folder(folder: Path, repository: Path, name: str) -> None:
    """Neither that of the run or the weights, nor those of the program."""
    content = (folder / name).read_bytes()
    if name.endswith(".pt2"):
        with zipfile.ZipFile(folder / name) as archive:
            content += b"".join(archive.read(part) for part in archive.namelist())
    for word in (str(folder), str(repository), str(Path(torch.__file__).parent), "site-packages"):
        assert word.encode() not in content, word


def test_the_pt2_file_holds_no_pickle(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        heads = [
            archive.read(name)[:4] for name in archive.namelist() if archive.getinfo(name).file_size > 100
        ]
    assert not [head for head in heads if head.startswith((b"PK\x03\x04", b"\x80"))]


Refused = Callable[..., str]


def test_a_program_needs_trust(folder: Path, refused: Refused) -> None:
    assert "[untrusted-program]" in refused("predict", "--model", folder / "model.pt2", folder / "images")


def rewrite(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes]
) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in extra.items():
            new.writestr(name, content)
    return target


@pytest.mark.parametrize("where", ["weights", "constants", "sample inputs", "library", "old format"])
def test_a_program_with_pickles_or_libraries_is_refused_even_if_trusted(
    folder: Path, tmp_path: Path, where: str
) -> None:
    def change(name: str, content: bytes) -> bytes:
        if where in ("weights", "constants") and name.endswith(f"model_{where}_config.json"):
            tree = json.loads(content)
            next(iter(tree["config"].values()))["use_pickle"] = True
            return json.dumps(tree).encode()
        return b"cos\nsystem\n." if where == "sample inputs" and "sample_inputs" in name else content

    extra = {"library": {"archive/data/aotinductor/model/x.so": b"\x7fELF"}}.get(where, {})
    if where == "old format":
        extra = {"archive/data/weights/model.pt": b"cos\nsystem\n."}
    path = rewrite(folder / "model.pt2", tmp_path / "bad.pt2", change, extra)
    with pytest.raises(UserError, match="not loaded"):
        ExportedPredictor(path, trust=True)


def test_bad_files_and_flags_are_refused_in_one_line(
    folder: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, model = folder / "images", folder / "model.pt2"
    other = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["x"], ["y"])],
            "other",
            [onnx.helper.make_tensor_value_info("x", 1, [1])],
            [onnx.helper.make_tensor_value_info("y", 1, [1])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(other, tmp_path / "other.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "text.pt2").write_text("no model")
    shutil.make_archive(str(tmp_path / "some"), "zip", images)
    (tmp_path / "some.zip").rename(tmp_path / "some.pt2")
    cases = {
        "other.onnx": "no detector that gn_detect exported",
        "text.onnx": "no ONNX model that onnxruntime can run",
        "text.pt2": "no detector that gn_detect exported",
        "some.pt2": "was not loaded",
        "absent.onnx": "no such file",
        "model.xyz": "must be .onnx or .pt2",
    }
    for name, message in cases.items():
        assert message in refused("predict", "--model", tmp_path / name, "--trust", images)
    predict = ["predict", "--trust", "--model", model]
    assert "--config-file" in refused(*predict, "--config-file", folder / "tiny.yaml", images)
    assert "MODEL.WEIGHTS" in refused(*predict, images, "MODEL.WEIGHTS", "x")
    assert "--weights" in refused(*predict, "--weights", "x", images)
    keys = ["--config-file", folder / "tiny.yaml", "MODEL.WEIGHTS", folder / "model.pth"]
    assert "[wrong-ending]" in refused("export", "--output", tmp_path / "model.pb", *keys)
    Image.new("RGB", (120, 40)).save(tmp_path / "flat.png")
    flat = ["export", "--output", tmp_path / "a.pt2", "--check", tmp_path / "flat.png", *keys]
    with monkeypatch.context() as patch:
        patch.setattr("gn_detect.export.write.export_detector", lambda _, path: shutil.copy(model, path))
        assert f"{tmp_path / 'flat.png'}: 120 x 40 pixels" in refused(*flat)
    (tmp_path / "a.pt2").unlink()
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert "[missing-package]" in refused("predict", "--model", tmp_path / "text.onnx", images)
    assert "[missing-package]" in refused("export", "--output", tmp_path / "a.onnx", *keys)
    assert not (tmp_path / "a.onnx").exists()


def test_a_failing_exporter_is_reported_in_one_line(
    folder: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("cannot trace\nmany lines")

    monkeypatch.setattr(torch.export, "export", fail)
    keys = ["--config-file", folder / "tiny.yaml", "MODEL.WEIGHTS", folder / "model.pth"]
    error = refused("export", "--output", tmp_path / "a.pt2", *keys)
    assert "cannot trace; " in error and "[cannot-export]" in error
    assert list(tmp_path.iterdir()) == []

    def fail_as_onnx(*_: object, **__: object) -> None:
        try:
            try:
                raise KeyError("u7")
            except KeyError as first:
                raise RuntimeError("Error when translating node %le") from first
        except RuntimeError as second:
            raise RuntimeError("Failed. Next steps:") from second

    monkeypatch.setattr(torch.export, "export", fail_as_onnx)
    error = refused("export", "--output", tmp_path / "a.pt2", *keys)
    assert "Error when translating node %le (KeyError: 'u7');" in error


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize(
    "config",
    [
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "GN/mask_rcnn_R_50_FPN_3x_gn.yaml",
        "GN/mask_rcnn_R_50_C4_gn.yaml",
    ],
)
def test_detectors_of_full_width_on_real_images(
    shared_dir: Path, tmp_path: Path, config: str, suffix: str
) -> None:
    """80 classes, C4 (whose sizes are no multiples) and FPN, FrozenBN and GN.

    Random weights decide little and magnify rounding, so the measure is what another memory order changes in
    the model itself.
    """
    keys = [
        "MODEL.DEVICE",
        "cpu",
        "MODEL.WEIGHTS",
        "",
        "INPUT.MIN_SIZE_TEST",
        "224",
        "INPUT.MAX_SIZE_TEST",
        "400",
    ]
    keys += ["MODEL.RPN.POST_NMS_TOPK_TEST", "100", "TEST.DETECTIONS_PER_IMAGE", "20"]
    cfg = load_config(config, [*keys, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.02"])
    decided_weights(cfg, tmp_path / "model.pth", head=0.05)
    predictor = Predictor(cfg.replace({"MODEL.WEIGHTS": str(tmp_path / "model.pth")}))
    path = tmp_path / f"model{suffix}"
    export.export_detector(predictor, path)
    images = sorted((shared_dir / "data/coco80/images").iterdir())[:10]
    parity = compare(predictor, exported.ExportedPredictor(path, trust=True), images)
    other = compare(predictor, Predictor(predictor.cfg.replace({"MODEL.CHANNELS_LAST": True})), images)
    print(config, suffix, parity, "; another memory order:", other)
    assert not parity.unequal
    assert parity.detections > 100
    if suffix == ".pt2":
        assert (parity.box, parity.score, parity.mask) == (0, 0, 1)
    assert parity.box <= max(0.05, 4 * other.box)
    assert parity.score <= max(1e-4, 4 * other.score)
    assert parity.mask >= 0.999 or parity.flipped <= max(1, 4 * other.flipped)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_trained_detector_on_real_images(shared_dir: Path, tmp_path: Path, suffix: str) -> None:
    """The nuclei detector of the oracle, R-18-FPN with GN, on twelve photos of different sizes."""
    oracle = shared_dir / "oracles/dsb_r18_gn"
    keys = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(oracle / "model_final.pth")]
    predictor = Predictor(load_config(oracle / "config.yaml", keys))
    path = tmp_path / f"model{suffix}"
    export.export_detector(predictor, path)
    images = sorted((shared_dir / "data/coco80/images").iterdir())[:12]
    parity = compare(predictor, exported.ExportedPredictor(path, trust=True), images)
    print(parity)
    assert parity.within_tolerances
    assert parity.detections > 100
    if suffix == ".pt2":
        assert (parity.box, parity.score, parity.mask) == (0, 0, 1)
