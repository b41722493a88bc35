"""Weights from the Hub: pinned, bounded, safetensors and JSON alone, and of a config only what fits them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from gn_detect import Predictor, load_config, train
from gn_detect.cli import main
from gn_detect.config.load import parse_config
from gn_detect.engine.resume import saved_config
from gn_detect.weights import hub as module
from gn_detect.weights import read_checkpoint, save_weights
from gn_detect.weights.hub import pinned, pull, read_name
from tests.engine.tiny import NAMES, make_dataset, write_config
from tests.refusal import refusal

from .conftest import REPO, config_file
from .server import Hub

NAME = f"hf://{REPO}"


def test_a_predictor_of_the_hub_finds_what_that_of_the_file_finds(
    hub: Hub, weights: bytes, tmp_path: Path
) -> None:
    commit = hub.commit(REPO, {"model.safetensors": weights, "config.json": config_file()})
    (tmp_path / "own.safetensors").write_bytes(weights)
    keys = {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "MODEL.DEVICE": "cpu"}
    # Its config.json has no config, so that the network is what the tensors imply.
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    hub.commit(REPO, {"config.json": config_file(config=yaml.safe_load(config_of(weights)))})
    ours, theirs = (Predictor.from_pretrained(n, keys) for n in (tmp_path / "own.safetensors", NAME))
    assert theirs.class_names == list(NAMES)
    assert theirs.cfg.model.weights != f"{NAME}@{commit}"
    a, b = ours(image), theirs(image)
    assert len(a) > 0 and a.boxes.equal(b.boxes) and a.scores.equal(b.scores) and a.masks.equal(b.masks)
    assert sorted({path.split("/")[-1] for path in hub.requests if "/resolve/" in path}) == [
        "config.json",
        "model.safetensors",
    ]
    assert set(hub.tokens) == {"Bearer hf_secret"}


def config_of(weights: bytes) -> str:
    """The config in the header of a file."""
    length = int.from_bytes(weights[:8], "little")
    return json.loads(json.loads(weights[8 : 8 + length])["__metadata__"]["config"])


@pytest.mark.parametrize("revision", ["", "@main", "@COMMIT"])
def test_a_name_is_pinned_to_the_commit(hub: Hub, weights: bytes, revision: str) -> None:
    commit = hub.commit(REPO, {"model.safetensors": weights})
    name = pinned(NAME + revision.replace("COMMIT", commit))
    assert name == f"{NAME}@{commit}"
    later = hub.commit(REPO, {"model.safetensors": weights + b" "})
    assert pinned(name) == name != pinned(NAME) == f"{NAME}@{later}"
    assert pull(name)[0].read_bytes() == weights
    asked = len(hub.requests)
    read_checkpoint(name)
    assert len(hub.requests) == asked, "a commit in the cache needs no network"


def test_other_weights_are_no_names_of_the_hub() -> None:
    for path in ("", "zoo://R-50-GN", "runs/one/model_best.pth", "https://host/a.pth"):
        assert pinned(path) == path


BAD_NAMES = ["hf://", "hf://one", "hf://a/b/c", "hf://a/b@", "hf://a/../b", "hf://a/b@../../x", "hf://a/b@/x"]
BAD_NAMES += [
    "hf://a/b@x//y",
    "hf://a/b@x/",
    "hf://a b/c",
    "hf://a/b@x\x1b[2J",
    "hf://a/b#c",
    "hf://user@host/x",
    "hf://a--b/c",
    "hf://a/b.git",
    f"hf://a/{'b' * 200}",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_none_is_refused_before_any_request(hub: Hub, name: str) -> None:
    with refusal("unknown-weights", "is no name on the Hub"):
        read_checkpoint(name)
    assert hub.requests == []


def test_a_pathlib_path_and_a_tag_with_slashes_are_names() -> None:
    assert str(read_name(Path("hf://a/b.c_d-e@refs/pr/1"))) == "hf://a/b.c_d-e@refs/pr/1"


def test_a_training_stores_the_commit_and_resume_and_a_later_run_take_it(
    hub: Hub, weights: bytes, tmp_path: Path
) -> None:
    commit = hub.commit(REPO, {"model.safetensors": weights})
    data = make_dataset(tmp_path / "data", 2)
    config = write_config(tmp_path, data)
    train(
        load_config(config, ["MODEL.WEIGHTS", NAME, "SOLVER.MAX_ITER", "1", "SOLVER.CHECKPOINT_PERIOD", "1"])
    )
    run = tmp_path / "run"
    hub.commit(REPO, {"model.safetensors": b"broken since"})
    assert load_config(run / "config.yaml").model.weights == f"{NAME}@{commit}"
    final = read_checkpoint(run / "model_final.pth")
    saved = saved_config(final)
    assert saved is not None and saved.model.weights == f"{NAME}@{commit}"
    cfg = load_config(run / "config.yaml", ["SOLVER.MAX_ITER", "2"])
    train(cfg, resume=True)
    assert load_config(run / "config.yaml").model.weights == f"{NAME}@{commit}"
    assert read_checkpoint(cfg.model.weights).metadata.class_names == list(NAMES), "the same file"


def test_weights_of_a_library_in_its_own_repository(hub: Hub, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra 'timm'")
    classifier = timm.create_model("test_efficientnet", pretrained=False)
    save_weights(tmp_path / "classifier.safetensors", classifier.state_dict())
    theirs = {"architecture": "test_efficientnet", "num_classes": 1000, "config": "of timm"}
    files = {
        "model.safetensors": (tmp_path / "classifier.safetensors").read_bytes(),
        "config.json": json.dumps(theirs).encode(),
        "pytorch_model.bin": b"never asked for",
    }
    hub.commit("timm/test_efficientnet.r160_in1k", files)
    data = make_dataset(tmp_path / "data", 2)
    words = ["train", "--train-json", data, "--train-images", data.parent / "images"]
    words += ["--backbone", "timm/test_efficientnet", "--weights", "hf://timm/test_efficientnet.r160_in1k"]
    words += [
        "OUTPUT_DIR",
        tmp_path / "run",
        "SOLVER.MAX_ITER",
        "1",
        "MODEL.DEVICE",
        "cpu",
        "VIS.NUM_IMAGES",
        "0",
    ]
    words += ["MODEL.BACKBONE.NORM", "keep", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "1"]
    words += ["INPUT.MIN_SIZE_TRAIN", "[64]", "MODEL.FPN.OUT_CHANNELS", "16"]
    words += ["MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"]
    words += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.GN.NUM_GROUPS", "4", "SOLVER.ACCUMULATE", "1"]
    assert main(list(map(str, words))) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "names of torchvision or timm translated" in log
    assert not any(path.endswith(".bin") for path in hub.requests)


HOSTILE = {
    "OUTPUT_DIR": "elsewhere",
    "DATASETS": {"TRAIN": ["x"], "REGISTER": {"x": {"ANNOTATIONS": "/etc/passwd", "IMAGES": "/"}}},
    "SOLVER": {"BASE_LR": 1e9},
}
HOSTILE_MODEL = {"WEIGHTS": "https://example.com/a.pth", "DEVICE": "cuda:7", "COMPILE": True, "FREEZE": ["*"]}


@pytest.mark.parametrize("place", ["config.json", "header"])
def test_of_a_config_only_what_belongs_to_weights_is_taken(
    hub: Hub, weights: bytes, tmp_path: Path, place: str
) -> None:
    known = yaml.safe_load(config_of(weights))
    tree = {**known, **HOSTILE, "MODEL": {**known["MODEL"], **HOSTILE_MODEL}}
    tree["INPUT"] = {**known["INPUT"], "MIN_SIZE_TEST": 96, "MASK_FORMAT": "bitmask"}
    files = {"model.safetensors": weights, "config.json": config_file(config=tree)}
    if place == "header":
        metadata = {"config": yaml.safe_dump(tree), "class_names": list(NAMES)}
        save_weights(tmp_path / "a.safetensors", read_checkpoint_of(weights, tmp_path), metadata)
        files = {"model.safetensors": (tmp_path / "a.safetensors").read_bytes()}
    hub.commit(REPO, files)
    predictor = Predictor.from_pretrained(NAME)
    cfg = predictor.cfg
    assert cfg.input.min_size_test == 96
    assert cfg.model.gn.num_groups == 4
    assert cfg.model.weights.startswith(f"{NAME}@")
    text = str(cfg)
    assert not [part for part in ("/etc/passwd", "elsewhere", "example.com", "1000000000.0") if part in text]
    assert (cfg.model.device, cfg.model.compile, cfg.model.freeze) == ("auto", False, ())
    assert cfg.input.mask_format == "polygon"


def read_checkpoint_of(weights: bytes, folder: Path) -> dict:
    (folder / "own.safetensors").write_bytes(weights)
    return read_checkpoint(folder / "own.safetensors").tensors


BAD_CONFIGS = {
    "a file that it builds on": ({"_BASE_": "/etc/passwd"}, "unknown-key", "_BASE_"),
    "a hidden name": ({"a\x1b[2J\n": 1}, "unknown-key", "a\\x1b[2J\\n"),
    "an unknown key": ({"MODEL": {"RPN": {"_BASE_": "x"}}}, "unknown-key", "MODEL.RPN._BASE_"),
    "another type": ({"MODEL": {"GN": {"NUM_GROUPS": "many"}}}, "bad-value", "MODEL.GN.NUM_GROUPS"),
    "another method": ({"MODEL": {"BACKBONE": {"NAME": "evil"}}}, "unsupported-value", "MODEL.BACKBONE.NAME"),
    "too large": ({"MODEL": {"FPN": {"OUT_CHANNELS": 10**9}}}, "bad-value", "MODEL.FPN.OUT_CHANNELS"),
    "a network with a path": (
        {
            "MODEL": {
                "BACKBONE": {"NAME": "build_timm_fpn_backbone", "MODEL": "hf-hub:evil/net"},
                "RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"]},
                "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"]},
                "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"]},
                "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
                "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead"},
            }
        },
        "unknown-backbone",
        "hf-hub:evil/net",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_wrong_value_of_a_shared_key_is_named(hub: Hub, weights: bytes, case: str) -> None:
    config, code, key = BAD_CONFIGS[case]
    hub.commit(REPO, {"model.safetensors": weights, "config.json": config_file(config=config)})
    with refusal(code, key):  # type: ignore[arg-type]
        Predictor.from_pretrained(NAME)


def test_text_that_would_become_a_group_is_not_taken(hub: Hub, weights: bytes) -> None:
    text = "{'WEIGHTS': 'https://example.com/a.pth'}"
    hub.commit(REPO, {"model.safetensors": weights, "config.json": config_file(config={"MODEL": text})})
    config = read_checkpoint(NAME).metadata.config
    assert config is not None and parse_config(config).model.weights == ""


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "damaged-record"),
        (b"\xff\xfe", "damaged-record"),
        (b"[" * 100_000, "damaged-record"),
        (config_file(class_names="square"), "damaged-record"),
        (config_file(category_ids=[1.5]), "damaged-record"),
    ],
)
def test_a_damaged_config_json_is_one_line(hub: Hub, weights: bytes, content: bytes, code: str) -> None:
    hub.commit(REPO, {"model.safetensors": weights, "config.json": content})
    with refusal(code, "config.json", NAME):  # type: ignore[arg-type]
        read_checkpoint(NAME)


def test_pickles_are_not_pulled(hub: Hub) -> None:
    hub.commit(REPO, {"pytorch_model.bin": pickle.dumps({"a": 1}), "model_best.pth": b"x", "README.md": b"x"})
    with refusal("unsafe-file", NAME, "pytorch_model.bin, model_best.pth", "model.safetensors"):
        read_checkpoint(NAME)
    assert not any("/resolve/" in path for path in hub.requests)


def test_a_pickle_under_the_name_of_safetensors_is_not_unpickled(hub: Hub, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    for data in (pickle.dumps(Evil()), pickle.dumps({"model": {"a": np.zeros(3)}})):
        hub.commit(REPO, {"model.safetensors": data})
        with refusal("damaged-weights", "model.safetensors"):
            read_checkpoint(NAME)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("files", [{}, {"README.md": b"x"}, {"model-00001-of-00002.safetensors": b"x"}])
def test_a_repository_without_weights_says_what_it_has(hub: Hub, files: dict[str, bytes]) -> None:
    hub.commit(REPO, files)
    with refusal("missing-weights", NAME, *(files or ["nothing"])):
        read_checkpoint(NAME)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_too_large_a_file_is_refused_before_its_download(hub: Hub, weights: bytes, file: str) -> None:
    hub.commit(REPO, {"model.safetensors": weights, "config.json": config_file()})
    hub.sizes[file] = 1 << 40
    with refusal("oversized-file", file, str(1 << 40)):
        read_checkpoint(NAME)
    hub.sizes[file] = None
    with refusal("download-failed", file):
        read_checkpoint(NAME)
    assert not any("/resolve/" in path for path in hub.requests)


def test_other_bytes_than_the_hub_lists_are_thrown_away(hub: Hub, weights: bytes) -> None:
    commit = hub.commit(REPO, {"model.safetensors": weights})
    hub.spoiled.add("model.safetensors")
    with refusal("damaged-weights", "sha256"):
        read_checkpoint(f"{NAME}@{commit}")
    hub.spoiled.clear()
    assert pull(f"{NAME}@{commit}")[0].read_bytes() == weights


def test_a_wrong_repository_or_revision(hub: Hub, weights: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with refusal("unknown-weights", "hf://ann/other@main", "HF_TOKEN"):
        read_checkpoint("hf://ann/other")
    hub.commit(REPO, {"model.safetensors": weights})
    for revision in ("v2", "0" * 40):
        with refusal("unknown-weights", f"{NAME}@{revision}"):
            read_checkpoint(f"{NAME}@{revision}")
    assert "hf_secret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("status", [401, 403, 404, 410, 500, 503])
def test_an_error_of_the_server_is_one_line(
    hub: Hub, status: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.status = status
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert main(["predict", NAME, str(tmp_path / "a.png")]) == 2
    printed = capfd.readouterr()
    code = "unknown-weights" if status == 404 else "download-failed"
    assert printed.err.startswith(f"error: cannot take {NAME}@main from the Hub: ")
    assert printed.err.endswith(f"[{code}]\n") and printed.err.count("\n") == 1, printed.err
    assert printed.out == ""


def test_no_answer_and_no_server(
    hub: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.commit(REPO, {"model.safetensors": weights})
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    hub.stall = 0.6
    with refusal("download-failed", "does not answer in time"):
        read_checkpoint(NAME)
    hub.stall = 0.0
    assert read_checkpoint(NAME).metadata.class_names == list(NAMES)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert pull(NAME)[1].revision == commit  # the branch, as it was
    assert commit in caplog.text
    with refusal("download-failed", "cannot be reached"):
        read_checkpoint("hf://ann/other")


def test_offline_mode_takes_what_is_in_the_cache(
    hub: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit(REPO, {"model.safetensors": weights, "config.json": config_file()})
    read_checkpoint(NAME)
    asked = len(hub.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (NAME, f"{NAME}@main", f"{NAME}@{commit}"):
        assert Predictor.from_pretrained(name).cfg.model.weights == f"{NAME}@{commit}"
    for name in (f"{NAME}@v2", "hf://ann/other"):
        with refusal("download-failed", "HF_HUB_OFFLINE", name):
            read_checkpoint(name)
    assert len(hub.requests) == asked


def test_class_names_cannot_control_a_terminal(
    hub: Hub, weights: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ["\x1b[2J\nsquare", "<script>alert(1)</script>\u202e"]
    entries = {"class_names": names, "score_thresholds": [0.1, 0.2]}
    config = yaml.safe_load(config_of(weights))
    hub.commit(REPO, {"model.safetensors": weights, "config.json": config_file(**entries, config=config)})
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = [
        "predict",
        NAME,
        str(tmp_path / "a.png"),
        "--threshold",
        "auto",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--workers", "0", "--no-pictures", "MODEL.DEVICE", "cpu"]) == 0
    out = "".join(capfd.readouterr())
    assert "\\x1b[2J\\nsquare" in out
    assert not {"\x1b", "\u202e"} & set(out)


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refusal("missing-package", NAME, "pip install huggingface_hub"):
        read_checkpoint(NAME)


@pytest.mark.slow
def test_the_variables_of_the_hub_are_heard(hub: Hub, weights: bytes, tmp_path: Path) -> None:
    """As a user sets them, in a process of its own."""
    import os

    hub.commit(REPO, {"model.safetensors": weights})
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = [sys.executable, "-m", "gn_detect", "predict", NAME, str(tmp_path / "a.png")]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    for offline in ("0", "1"):
        env["HF_HUB_OFFLINE"] = offline
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "Bearer hf_secret" in hub.tokens and "hf_secret" not in done.stdout + done.stderr
