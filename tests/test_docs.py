"""Every command in the README and in docs/ is run, in order, on a few small pictures.

A command that needs a network, a GPU or more than a moment is marked ``parsed`` in the name of its test: the
parser must take it, and that is all. Jobs are made small by what :func:`shrunk` adds.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from gn_detect.cli import main
from gn_detect.cli.main import parse
from gn_detect.config import load_config
from gn_detect.config.explain import reference
from gn_detect.modeling import build_model
from tests.data.format_writers import write_yolo
from tests.engine.tiny import make_dataset, write_config

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

PARSED_ONLY = {
    r"--backbone|convert mobilenet_v2": "needs the weights of a classifier",
    r"(zoo|hf)://|zoo (list|info|download|verify)|DEFAULT|https://": "needs the network",
    r"--num-gpus [2-9]|bench norm": "is for a GPU",
    r"bench train": "times a whole model",
    r"gn-detect export|predict model.onnx": "takes a minute, and tests/cli/test_export.py does it",
    r"convert .*--images": "takes long; tests/cli/test_convert.py and the line with calibrate run it",
    r"(GN|quick)/[\w.]+yaml": "trains a whole model, or generates 500 pictures",
    r"python tools/|mmdetection\.pth|torchvision\.pth": "the same command, or another library's file",
}
"""Commands that are parsed and not run, and why."""

OUTSIDE = re.compile(r"(git|pip|make|python -m|source|cd|eval|torchrun) |#|$")
"""Of other programs."""

SHORT_RUN = [
    "MODEL.DEVICE",
    "cpu",
    "SOLVER.MAX_ITER",
    "1",
    "TEST.EVAL_PERIOD",
    "0",
    "SOLVER.CHECKPOINT_PERIOD",
    "0",
    "VIS.NUM_IMAGES",
    "0",
]

SMALL_MODEL = [
    "MODEL.GN.NUM_GROUPS",
    "4",
    "MODEL.FPN.OUT_CHANNELS",
    "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "16",
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "8",
    "MODEL.ROI_BOX_HEAD.CONV_DIM",
    "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "16",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "16",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    "50",
    "MODEL.RPN.POST_NMS_TOPK_TEST",
    "20",
    "TEST.DETECTIONS_PER_IMAGE",
    "5",
    "INPUT.MIN_SIZE_TRAIN",
    "[64]",
    "INPUT.MIN_SIZE_TEST",
    "64",
    *SHORT_RUN,
]


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks of commands; continued lines are joined, comments removed."""
    text = page.read_text("utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fenced if language in ("", "sh", "console")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").partition("  #")[0].strip() for line in lines]


def ours(line: str) -> bool:
    """Whether it is a command of this package."""
    return line.startswith(("gn-detect ", "python tools/"))


def why_parsed_only(line: str) -> str | None:
    return next((why for pattern, why in PARSED_ONLY.items() if re.search(pattern, line)), None)


def shrunk(words: list[str]) -> list[str]:
    """A job that takes a moment instead."""
    command = words[0]
    if command == "train":
        fresh = ("--train-json" in words or "--data" in words) and "--weights" not in words
        return [*words, *(SMALL_MODEL if fresh else SHORT_RUN)]
    if command in ("convert", "calibrate") and "--images" in words:
        return [*words[:3], "--steps", "1", "--max-images", "3", "--batch-size", "1", *words[3:]]
    return words


@pytest.fixture
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    made = make_dataset(folder / "made", 4)
    shutil.copytree(made.parent / "images", folder / "images")
    shutil.copytree(made.parent / "images", folder / "photos")
    for name in ("train.json", "val.json"):
        shutil.copy(made, folder / name)
    write_yolo(json.loads(made.read_text()), made.parent / "images", folder / "yolo")
    Image.new("RGB", (80, 64), (90, 60, 30)).save(folder / "photo.jpg")
    shutil.move(write_config(folder), folder / "bn.yaml")
    text = (folder / "bn.yaml").read_text().replace("NORM: GN", "NORM: BN")
    (folder / "bn.yaml").write_text(text)
    torch.manual_seed(0)
    torch.save({"model": build_model(load_config(folder / "bn.yaml")).state_dict()}, folder / "bn.pth")
    (folder / "runs" / "one").mkdir(parents=True)  # the quick start's training, from which others go on
    copies = (
        ("bn.yaml", "config.yaml"),
        ("bn.pth", "model_final.pth"),
        ("bn.pth", "runs/one/model_best.pth"),
    )
    for name, copy in copies:
        shutil.copy(folder / name, folder / copy)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of a page in their order, as each may build on those before."""
    monkeypatch.setattr("gn_detect.convert.balance.STEPS", 2)
    monkeypatch.chdir(workplace)
    for command in filter(ours, commands(page)):
        line, _, target = command.partition(" > ")
        words = shlex.split(line.removeprefix("gn-detect "))
        if line.startswith("python tools/"):
            script = (REPOSITORY / words[1]).read_text("utf-8")
            before = re.findall(r'main\(\["([a-z-]+)"', script)
            words = [*before, *words[2:]]
        if why_parsed_only(line):
            assert parse(words).command, command
            continue
        status = main(shrunk(words))
        printed = capsys.readouterr()
        assert status in ((0, 1) if "--strict" in words else (0,)), f"{command}\n{printed.err}"
        if target:
            (workplace / target).write_text(printed.out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_line_of_a_block_is_a_command_that_is_known(page: Path) -> None:
    assert [line for line in commands(page) if not ours(line) and not OUTSIDE.match(line)] == []


def test_the_config_reference_is_fresh() -> None:
    remedy = "run: gn-detect config reference > docs/config.md"
    assert (REPOSITORY / "docs" / "config.md").read_text("utf-8") == reference(), remedy


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
