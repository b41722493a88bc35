"""``gn-detect zoo``, and weights by name wherever a path does."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gn_detect
from gn_detect.cli import main
from gn_detect.cli.zoo import as_markdown
from gn_detect.weights import download, read_checkpoint, save_weights
from gn_detect.weights.zoo import ZooEntry, find_entry, read_catalog
from tests.cli.conftest import Case
from tests.weights import schemes
from tests.weights.server import Site, serve, status, whole

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty."""
    monkeypatch.setenv("GN_DETECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host is found."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A trusted https server on this computer."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    site = serve(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(download, "BACK_OFF", 0.01)
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def entry(case: Case, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ZooEntry:
    """A catalogue of one: a small detector in Detectron's names, which the server has."""
    cfg = gn_detect.load_config(case.config)
    torch.manual_seed(0)
    state = schemes.randomised(gn_detect.build_model(cfg))
    theirs = {name: tensor for name, tensor in state.items() if "pixel_" not in name}
    schemes.write_pickle(tmp_path / "served.pkl", {"model": schemes.arrays(theirs), "__author__": "somebody"})
    data = (tmp_path / "served.pkl").read_bytes()
    site.answers = [whole(data)]
    entry = ZooEntry(
        name="tiny",
        kind="detector",
        scheme="detectron2",
        url=f"{site.url}/models/tiny.pkl",
        bytes=len(data),
        checksum=f"sha256:{hashlib.sha256(data).hexdigest()}",
        config=str(case.config),
        licence="CC BY-SA 3.0",
        source="https://example.com",
    )
    monkeypatch.setattr("gn_detect.weights.zoo.read_catalog", lambda: {"tiny": entry})
    return entry


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "zoo", "list").splitlines()
    assert lines[0].split() == ["name", "box/mask", "AP", "trained", "downloaded"]
    assert [line.split()[0] for line in lines[1:]] == list(read_catalog())
    assert max(map(len, lines)) <= 80
    file = find_entry("R-50-GN").file
    file.parent.mkdir(parents=True)
    file.touch()
    assert run(capsys, "zoo", "list", "R-50-GN").splitlines()[1].split()[-1] == "yes"


def test_info_and_path(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    printed = run(capsys, "zoo", "info", "timm-resnet50_gn", "R-50-GN", "mask-R-50-FPN-GN-3x")
    for words in (
        "checksum      sha256:8fe6c4d0",
        "--weights zoo://timm-resnet50_gn INPUT.FORMAT RGB MODEL.PIXEL_MEAN '[123.675, 116.28, 103.53]'",
        "md5, at https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/47261647/R-50-GN.pkl.md5",
        "checksum      none is published",
        "licence       CC BY-SA 3.0",
        "top-1 error   24.0% of ImageNet's val images",
        "box AP        42.6% on COCO val",
        "schedule      3x, where 1x is 90,000 iterations of 16 images",
        "GPU memory    5.6 GB for 2 images in training",
        "training step 0.309 s for 16 images on 8 GPUs",
    ):
        assert words in printed
    assert "bytes" not in printed
    assert "size" not in printed
    file = find_entry("R-50-GN").file
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(2_345_678))
    assert "size          2.3 MB" in run(capsys, "zoo", "info", "R-50-GN")
    path = run(capsys, "zoo", "path", "R-50-GN").strip()
    assert path == str(find_entry("R-50-GN").file)
    assert path.startswith(str(cache))
    assert path in printed


def test_the_table_in_the_readme_is_that_of_the_catalogue(repository: Path) -> None:
    """``gn-detect zoo list --markdown`` makes it."""
    text = (repository / "model_zoo" / "README.md").read_text(encoding="utf-8")
    assert text.endswith(as_markdown(read_catalog().values()))
    assert text.count("\n| [") == 64


def test_download_verify_and_again(
    entry: ZooEntry, site: Site, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    assert run(capsys, "zoo", "verify") == "nothing is downloaded\n"
    assert "gn-detect zoo download tiny" in refused("zoo", "verify", "tiny")
    for _ in range(2):  # the second time it is there
        printed = run(capsys, "zoo", "download", "tiny")
        assert printed.startswith(f"tiny: {entry.file}, {entry.bytes} bytes, sha256 ")
    assert len(site.requests) == 1
    assert "as published" in run(capsys, "zoo", "verify")
    entry.file.write_bytes(entry.file.read_bytes()[:-1] + b"x")
    assert "[damaged-weights]" in refused("zoo", "verify")


def test_download_by_the_script(repository: Path, refused: Refused) -> None:
    text = (repository / "tools" / "download_weights.py").read_text()
    assert 'main(["zoo", "download", *sys.argv[1:]])' in text
    assert "[missing-argument]" in refused("zoo", "download")
    assert "R-50-GN" in refused("zoo", "download", "R-50-GM")


def test_offline(offline: None, refused: Refused, cache: Path) -> None:
    """Says at once what is wrong, and where to put the file."""
    error = refused("zoo", "download", "mmdetection-R-50-GN")
    assert "seems to be offline" in error
    assert f"put it at {cache}/download.openmmlab.com/pretrain/third_party/resnet50_gn-9186a21c.pth" in error
    error = refused("train", "--config-file", "GN/mask_rcnn_R_50_FPN_2x_gn.yaml", "--fix-config")
    assert "R-50-GN.pkl: its host cannot be found" in error


def test_forbidden(entry: ZooEntry, site: Site, refused: Refused) -> None:
    site.answers = [status(403)]
    assert f"the server answers 403 Forbidden; fetch it by other means and put it at {entry.file}" in refused(
        "zoo", "download", "tiny"
    )


def test_commands_take_names(
    entry: ZooEntry, case: Case, capsys: pytest.CaptureFixture[str], tmp_path: Path, site: Site
) -> None:
    """eval, train, predict and convert with MODEL.WEIGHTS zoo://tiny, or its URL; one download for all."""
    common = ["--config-file", case.config, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    output = ["OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", 1]
    assert main([str(w) for w in ["eval", *common, *output, "MODEL.WEIGHTS", "zoo://tiny"]]) == 0
    output += ["DATASETS.TEST", "[]"]
    assert main([str(w) for w in ["train", *common, *output, "MODEL.WEIGHTS", entry.url]]) == 0
    capsys.readouterr()
    images = [case.val.parent / "images", "MODEL.WEIGHTS", "zoo://tiny"]
    printed = run(capsys, "predict", *common[:2], "--output", tmp_path / "pictures", *images)
    assert printed.startswith("loaded 103 of 103 tensors from ")
    printed = run(capsys, "convert", "--keep-norm", "zoo://tiny", tmp_path / "tiny.safetensors")
    assert "wrote 103 tensors" in printed
    assert read_checkpoint(tmp_path / "tiny.safetensors").metadata.input.format == "BGR"
    assert len(site.requests) == 1


def test_other_input_than_the_weights_were_trained_with(
    entry: ZooEntry, case: Case, refused: Refused, tmp_path: Path
) -> None:
    """Refused with the keys to set; ``--fix-config`` sets them, and the run's config has them."""
    words = ["train", "--config-file", case.config, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "[]"]
    words += ["MODEL.WEIGHTS", "zoo://tiny", "INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"]
    error = refused(*words)
    assert "add --fix-config, or set INPUT.FORMAT BGR MODEL.PIXEL_STD '[57.4, 57.1, 58.4]'" in error
    assert not case.output.exists()
    assert main([str(word) for word in [*words, "--fix-config"]]) == 0
    cfg = gn_detect.load_config(case.output / "config.yaml")
    assert cfg.input.format == "BGR"
    assert list(cfg.model.pixel_std) == [57.4, 57.1, 58.4]
    target = tmp_path / "gn.pth"
    assert "none" not in refused("convert", "zoo://nothing", target)
    assert not target.exists()


def test_formats_of_convert(entry: ZooEntry, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From any to any, with the values as they were."""
    source = "zoo://tiny"
    for ending in ("pth", "pkl", "safetensors", "pt"):
        target = tmp_path / f"weights.v1.{ending}"
        run(capsys, "convert", "--keep-norm", "--format", ending, source, tmp_path / "weights.v1")
        found, expected = read_checkpoint(target), read_checkpoint("zoo://tiny")
        assert found.metadata.input == expected.metadata.input
        assert set(found.tensors) == set(expected.tensors)
        assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
        source = str(target)


def test_convert_refuses(refused: Refused, tmp_path: Path) -> None:
    save_weights(tmp_path / "a.pth", {"w": torch.ones(2)})
    assert "[wrong-ending]" in refused("convert", "--keep-norm", tmp_path / "a.pth", tmp_path / "b.onnx")
    error = refused("convert", "--keep-norm", "--format", "pkl", tmp_path / "a.pth", tmp_path / "b.pth")
    assert "--format pkl, but" in error
    assert [path.name for path in tmp_path.glob("b*")] == []


def test_safetensors_say_what_they_are(
    case: Case, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Config, classes, pixel statistics and the program's version, readable without this package."""
    import safetensors

    words = ["train", "--config-file", case.config, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "[]"]
    assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    run(capsys, "convert", "--keep-norm", case.output / "model_final.pth", tmp_path / "m.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        printed = {key: json.loads(text) for key, text in file.metadata().items()}
    assert printed["class_names"] == ["square", "bar"]
    assert printed["category_ids"] == [3, 7]
    assert printed["input"]["pixel_std"] == [57.4, 57.1, 58.4]
    assert printed["format_version"] == 1
    assert printed["gn_detect_version"] == gn_detect.__version__
    (tmp_path / "config.yaml").write_text(printed["config"])
    cfg = gn_detect.load_config(tmp_path / "config.yaml", ["MODEL.WEIGHTS", str(tmp_path / "m.safetensors")])
    assert gn_detect.Predictor(cfg).class_names == ["square", "bar"]
