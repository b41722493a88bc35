"""Weights to the Hub and beside a file: what is written, what the card says, and what it does not tell."""

from __future__ import annotations

import getpass
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gn_detect import Predictor, load_config
from gn_detect.cli import main
from gn_detect.config import dump_config, without_paths
from gn_detect.config.shared import SHARED
from gn_detect.evaluation import METRICS
from gn_detect.export import card as module
from gn_detect.modeling import build_model
from gn_detect.weights import CheckpointMetadata, read_checkpoint, save_weights
from gn_detect.weights.hub import push
from tests.cli.conftest import refused
from tests.engine.tiny import NAMES, make_dataset, write_config
from tests.refusal import refusal

from .conftest import REPO
from .server import Hub

__all__ = ["refused"]

NAME = f"hf://{REPO}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training with a test set."""
    folder = tmp_path_factory.mktemp("a-secret-folder")
    train, val = make_dataset(folder / "train", 4, same=True), make_dataset(folder / "val", 2, same=True)
    config = write_config(folder, train, val)
    keys = [
        "SOLVER.MAX_ITER",
        "30",
        "TEST.EVAL_PERIOD",
        "15",
        "SOLVER.OPTIMIZER",
        "AdamW",
        "SOLVER.BASE_LR",
        "3e-3",
    ]
    assert main(["train", "--config-file", str(config), *keys]) == 0
    return folder / "run"


def front_matter(card: str) -> dict[str, Any]:
    """The YAML at the top, as huggingface_hub reads it."""
    repocard = pytest.importorskip("huggingface_hub.repocard", reason="needs the extra 'hub'")
    return repocard.ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def texts(value: Any) -> Iterator[str]:
    """All strings in nested values, also those of JSON in strings."""
    if isinstance(value, dict):
        yield from texts(list(value.keys()))
        yield from texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


def header(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_what_was_pushed_is_pulled(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run / "model_best.pth"
    assert main(["export", "--json", str(best), "--push", NAME, "--license", "apache-2.0"]) == 0
    printed = capsys.readouterr()
    pushed = json.loads(printed.out)
    commit = hub.refs[REPO]["main"]
    assert pushed["pushed"] == f"{NAME}@{commit}"
    assert pushed["url"] == f"{hub.url}/{REPO}/commit/{commit}"
    assert hub.visibility[REPO] == "private"
    assert (
        set(hub.commits[REPO][commit])
        == set(pushed["files"])
        == {"README.md", "config.json", "model.safetensors"}
    )
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert "hf_secret" not in printed.out + printed.err
    assert "%" not in printed.err, "no progress without a terminal"

    keys = {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
    ours, theirs = Predictor.from_pretrained(best, keys), Predictor.from_pretrained(NAME, keys)
    image = next((run.parent / "val" / "images").iterdir())
    a, b = ours(image), theirs(image)
    assert len(a) > 0 and a.boxes.equal(b.boxes) and a.scores.equal(b.scores) and a.masks.equal(b.masks)
    for name in ("class_names", "category_ids", "score_thresholds"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert main(["export", str(best), "--push", NAME]) == 0, "a repository that exists gets another commit"
    assert hub.refs[REPO]["main"] != commit


def test_nothing_that_is_pushed_tells_where_it_was_made(hub: Hub, run: Path) -> None:
    assert main(["export", str(run / "model_final.pth"), "--push", NAME]) == 0
    files = hub.commits[REPO][hub.refs[REPO]["main"]]
    found = [files["README.md"].decode(), *texts(json.loads(files["config.json"]))]
    found += texts(header(files["model.safetensors"]))
    assert len(found) > 200
    secrets = [str(run), str(run.parent), run.parent.name, str(Path.home()), "/tmp", "hf_secret"]
    secrets += [socket.gethostname(), "annotations.json", "MODEL.WEIGHTS", "OUTPUT_DIR", "REGISTER"]
    user = getpass.getuser()
    assert [(secret, text) for secret in secrets for text in found if secret in text] == []
    assert [text for text in found if text == user or f"/{user}" in text or f"{user}@" in text] == []
    assert not any(str(Path(sys.prefix)) in text for text in found)
    config = json.loads(files["config.json"])["config"]
    assert yaml.safe_load(json.loads(header(files["model.safetensors"])["__metadata__"]["config"])) == config
    assert {key.split(".")[0] for key in SHARED} == set(config)


def test_no_key_that_is_shared_holds_a_path_or_an_address() -> None:
    keys = {"MODEL.WEIGHTS": "/secret", "OUTPUT_DIR": "/secret", "DATASETS.ROOT": "/secret"}
    register = {"a": {"ANNOTATIONS": "/secret", "IMAGES": "/secret"}}
    cfg = load_config().replace({**keys, "DATASETS.REGISTER": register, "DATASETS.TRAIN": ["a"]})
    from gn_detect.config.shared import read_shared, shared_values

    values = shared_values(cfg)
    assert [text for text in texts(values) if "/" in text] == []
    assert read_shared(values, "itself") == load_config()


def test_the_card_says_data_results_and_use(hub: Hub, run: Path) -> None:
    assert main(["export", str(run / "model_final.pth"), "--push", NAME, "--license", "cc-by-4.0"]) == 0
    text = hub.commits[REPO][hub.refs[REPO]["main"]]["README.md"].decode()
    data = front_matter(text)
    assert data["library_name"] == "gn_detect"
    assert data["license"] == "cc-by-4.0"
    assert data["pipeline_tag"] == "image-segmentation"
    assert "base_model" not in data
    results = json.loads((run / "results.json").read_text())
    index = data["model-index"][0]
    assert index["name"] == REPO
    assert index["results"][0]["dataset"]["name"] == "tiny_test"
    reported = {each["name"]: each["value"] for each in index["results"][0]["metrics"]}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        for average in ("AP", "AP50", "AP75"):
            assert reported[f"{name} {average}"] == pytest.approx(results[kind][average], abs=0.005)
        row = " | ".join(f"{results[kind][average]:.1f}" for average in ("AP", "AP50", "AP75"))
        assert f"| {name} | {row} |" in text
    assert "| training | 4 | 8 |" in text and "| tests | 2 | 4 |" in text
    assert "2 classes: `square`, `bar`" in text
    assert "Mask R-CNN R-18-FPN with GN" in text
    assert f'Predictor.from_pretrained("{NAME}")' in text
    assert "started from random weights" in text


def test_the_results_are_those_of_the_weights(run: Path) -> None:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    by_iteration = {line["iteration"]: line for line in lines if "bbox/AP" in line}
    assert sorted(by_iteration) == [14, 29]
    assert by_iteration[14]["segm/AP"] != by_iteration[29]["segm/AP"] > 0
    for name in ("model_best.pth", "model_final.pth"):
        metadata = read_checkpoint(run / name).metadata
        assert metadata.iteration is not None
        line = by_iteration[metadata.iteration]
        scalars = {
            key: line[key] for key in line if key.rpartition("/")[2] in METRICS and line[key] is not None
        }
        assert metadata.results == pytest.approx(scalars, abs=1e-4)
        assert {"bbox/AP", "segm/AP"} <= metadata.results.keys()


def checkpoint_file(folder: Path, **changes: Any) -> Path:
    """A checkpoint of a small detector with other classes, starting weights or results."""
    cfg = load_config(write_config(folder)).replace(changes.pop("keys", {}))
    torch.manual_seed(0)
    entries = {"class_names": list(NAMES), "category_ids": [3, 7], "config": dump_config(cfg), **changes}
    save_weights(folder / "model.pth", build_model(cfg).state_dict(), CheckpointMetadata(**entries))
    return folder / "model.pth"


def exported(folder: Path, *words: str, **changes: Any) -> str:
    """The card beside a safetensors file."""
    path = checkpoint_file(folder, **changes)
    assert main(["export", str(path), "--output", str(folder / "out" / "model.safetensors"), *words]) == 0
    return (folder / "out" / "model.safetensors.md").read_text()


STARTS = {
    "": ["random weights"],
    "/home/ann/secret.pth": ["a local file", "may inherit"],
    "zoo://R-50-GN": ["`R-50-GN` of the model zoo", "CC BY-SA 3.0", "may inherit"],
    "zoo://of-a-later-version": ["whose licence is not recorded"],
    "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47261647/R-50-GN.pkl": ["`R-50-GN`"],
    "https://ann:secret@example.com/a.pth?token=secret": ["`example.com`", "not recorded"],
    f"hf://timm/resnet26d.bt_in1k@{'a' * 40}": ["[timm/resnet26d.bt_in1k](", "a" * 40, "may inherit"],
}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A small detector."""
    return Predictor.from_pretrained(checkpoint_file(tmp_path_factory.mktemp("predictor")))


@pytest.mark.parametrize("start", STARTS)
def test_the_licence_note_names_the_starting_weights(predictor: Predictor, start: str) -> None:
    config = dump_config(without_paths(predictor.cfg.replace({"MODEL.WEIGHTS": start})))
    metadata = CheckpointMetadata(config=config)
    text = module.model_card(predictor, metadata, name="model.onnx", source="runs/model_best.pth")
    note = text.partition("## Licence")[2]
    assert [part for part in STARTS[start] if part not in note] == []
    assert "secret" not in text
    data = front_matter(text)
    assert "license" not in data, "the licence of the start is not that of the result"
    assert data.get("base_model") == ("timm/resnet26d.bt_in1k" if start.startswith("hf://") else None)


def test_what_an_exported_file_does_not_hold_is_not_made_up(tmp_path: Path, run: Path) -> None:
    """A second export knows the AP and not the start; with other settings it does not know the AP."""
    out, second = tmp_path / "one.safetensors", tmp_path / "second" / "two.safetensors"
    assert main(["export", str(run / "model_best.pth"), "--output", str(out)]) == 0
    assert main(["export", str(out), "--output", str(second)]) == 0
    text = second.with_name("two.safetensors.md").read_text()
    assert "What the training started from is not recorded." in text
    results = front_matter((tmp_path / "one.safetensors.md").read_text())["model-index"][0]["results"]
    assert front_matter(text)["model-index"][0]["results"][0]["metrics"] == results[0]["metrics"]
    assert main(["export", str(out), "--output", str(second), "INPUT.MIN_SIZE_TEST", "96"]) == 0
    assert "model-index" not in front_matter(second.with_name("two.safetensors.md").read_text())
    assert read_checkpoint(second).metadata.results == {}


def test_the_licence_of_the_zoos_own_weights(predictor: Predictor) -> None:
    given: dict[str, Any] = {"name": "model.onnx", "source": "zoo://mask-R-50-FPN-GN-3x"}
    text = module.model_card(predictor, CheckpointMetadata(config=dump_config(predictor.cfg)), **given)
    assert front_matter(text)["license"] == "cc-by-sa-3.0"
    assert "These are `mask-R-50-FPN-GN-3x` of the model zoo, published under CC BY-SA 3.0" in text
    given["licence"] = "apache-2.0"
    text = module.model_card(predictor, CheckpointMetadata(), **given)
    assert front_matter(text)["license"] == "apache-2.0"


HOSTILE = [
    "<script>alert(1)</script>",
    "[a](javascript:alert(1)) ![b](https://example.com/x.png)",
    "`code` ``more`` | cell |\n---\nlicense: evil\n---\n# Title",
    "\x1b[2J\x1b[31mred\u202e",
    "https://example.com www.example.com @ann #1",
    "---\nbase_model: evil/model",
    "x" * 5000,
]


def test_text_of_users_is_no_markup(tmp_path: Path) -> None:
    """CommonMark's own parser finds code spans and nothing else in them."""
    names = [HOSTILE[0], " ".join(HOSTILE[1:3])]
    text = exported(tmp_path, class_names=names)
    data = front_matter(text)
    assert "license" not in data and "base_model" not in data
    line = next(line for line in text.splitlines() if "2 classes" in line)
    assert text.count("# Title") == 1 and "\\n---\\nlicense: evil" in line
    for name in HOSTILE:
        shown = module.code(name)
        assert "\n" not in shown and "\x1b" not in shown and "\u202e" not in shown and len(shown) < 250
        fence = shown[: len(shown) - len(shown.lstrip("`"))]
        inside = shown[len(fence) : -len(fence)]
        assert fence and shown.endswith(fence) and fence not in inside
        assert not (inside.startswith("`") or inside.endswith("`"))
    markdown = pytest.importorskip("markdown", reason="needs the extra 'docs'")
    html = markdown.markdown(
        ", ".join(map(module.code, ["", "`", *HOSTILE, " ", "``", HOSTILE[0], "a\\", ""]))
    )
    assert not [tag for tag in ("<script", "<a ", "<img", "<h1", "<hr") if tag in html], html


def test_each_exported_file_has_a_card_of_its_own(tmp_path: Path) -> None:
    """Two exports into one folder: each card speaks of its file; a second export replaces its own card."""
    path, out = checkpoint_file(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# My project\n")
    names = ["one.safetensors", "two.safetensors", "README.safetensors"]
    for name in (*names, names[0]):
        assert main(["export", str(path), "--output", str(out / name)]) == 0
    assert {file.name for file in out.iterdir()} == {"README.md", *names, *(f"{name}.md" for name in names)}
    for name in names:
        text = (out / f"{name}.md").read_text()
        assert f"# `{name}`" in text and f'from_pretrained("{name}")' in text
        assert Predictor.from_pretrained(out / name).class_names == list(NAMES)
    assert (out / "README.md").read_text() == "# My project\n"
    target = out / names[0]
    text = target.with_name("one.safetensors.md").read_text()
    assert module.write_card(target, text + "later\n").read_text() == text + "later\n", "ours is written anew"


@pytest.mark.parametrize("text", ["# My notes\n", "", "---\nlibrary_name: other\n---\n", "\ufeff---\n", None])
def test_a_file_of_the_user_in_the_place_of_the_card_stays(
    tmp_path: Path, refused: Any, text: str | None
) -> None:
    """None stands for a folder. Nothing is exported."""
    path, card = checkpoint_file(tmp_path), tmp_path / "model.safetensors.md"
    if text is None:
        card.mkdir()
    else:
        card.write_text(text, encoding="utf-8")
    line = refused("export", path, "--output", tmp_path / "model.safetensors")
    assert "replaced-file" in line and str(card) in line
    assert text is None or card.read_text(encoding="utf-8") == text
    assert not (tmp_path / "model.safetensors").exists()


def test_wrong_flags(tmp_path: Path, refused: Any) -> None:
    path = checkpoint_file(tmp_path)
    assert "conflicting-flags" in refused("export", path, "--push", NAME, "--output", tmp_path / "a.onnx")
    assert "conflicting-flags" in refused(
        "export", path, "--output", tmp_path / "a.safetensors", "--check", path
    )
    for licence in ("Apache 2.0", "a\n---", "../x", "-"):
        assert "bad-argument" in refused(
            "export", path, "--output", tmp_path / "a.safetensors", f"--license={licence}"
        )
    assert "unknown-weights" in refused("export", path, "--push", "me/shapes")
    assert "wrong-ending" in refused("export", path, "--output", tmp_path / "a.pkl")
    assert {file.name for file in tmp_path.iterdir()} == {"model.pth", "tiny.yaml"}


def test_a_push_that_fails_is_one_line(hub: Hub, tmp_path: Path, refused: Any) -> None:
    files = {"README.md": tmp_path / "README.md"}
    files["README.md"].write_text("# A card")
    for status, part in ((401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "name"), (413, "413")):
        hub.status = status
        with refusal("upload-failed", f"cannot push to {NAME}@main: ", part) as caught:
            push(NAME, files)
        assert "hf_secret" not in caught.value.line
    hub.status = 0
    hub.commit(REPO, {})
    path = checkpoint_file(tmp_path)
    assert "branch" in refused("export", "--quiet", path, "--push", f"{NAME}@nowhere")
    assert set(hub.refs[REPO]) == {"main"}


@pytest.mark.slow
def test_the_card_of_a_training_on_the_demo_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in data and config, for a moment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GN_DETECT_DATASETS", str(tmp_path / "datasets"))
    words = ["train", "--config-file", "quick/demo.yaml", "OUTPUT_DIR", "run", "SOLVER.MAX_ITER", "6"]
    words += ["INPUT.MIN_SIZE_TEST", "96", "INPUT.MIN_SIZE_TRAIN", "[96]", "SOLVER.IMS_PER_BATCH", "2"]
    assert main([*words, "MODEL.DEVICE", "cpu", "VIS.NUM_IMAGES", "0"]) == 0
    assert main(["export", "run/model_final.pth", "--output", "out/model.safetensors"]) == 0
    text = Path("out/model.safetensors.md").read_text()
    data = front_matter(text)
    results = json.loads(Path("run/results.json").read_text())
    metrics = {each["name"]: each["value"] for each in data["model-index"][0]["results"][0]["metrics"]}
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == "demo_val"
    assert metrics["box AP"] == pytest.approx(results["bbox"]["AP"], abs=0.005)
    assert metrics["mask AP"] == pytest.approx(results["segm"]["AP"], abs=0.005)
    assert "8 classes: `circle`" in text or "8 classes: `" in text
    assert str(tmp_path) not in text
