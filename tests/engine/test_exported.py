"""Archives of programs that were made to look to the check unlike what PyTorch then loads."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gn_detect.config import dump_config, load_config
from gn_detect.errors import UserError
from gn_detect.export.run import ExportedPredictor, _is_of, _read_pt2_metadata
from gn_detect.export.write import ExportMetadata
from tests.engine.tiny import write_config

CONFIG = "data/weights/model_weights_config.json"
TOLD = {"version": "1"}


class Program(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """What ``torch.export.save`` writes, with parts as we export them; they are rewritten without padding."""
    path = tmp_path / "saved.pt2"
    program = torch.export.export(Program(), (torch.ones(3),))
    torch.export.save(program, path, extra_files={"gn_detect.json": json.dumps(TOLD)})
    with zipfile.ZipFile(path) as source:
        parts = {
            name: b"" if name.endswith("sample_inputs/model.pt") else source.read(name)
            for name in source.namelist()
        }
    return write(tmp_path / "model.pt2", list(parts.items()))


def write(path: Path, parts: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for name, content in parts:
            target.writestr(name, content)
    return path


def read(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as source:
        return [(name, source.read(name)) for name in source.namelist()]


def as_pickles(content: bytes) -> bytes:
    """The same number of bytes, and weights that would be unpickled."""
    changed = content.replace(b'"use_pickle": false', b'"use_pickle":true  ')
    assert changed != content
    assert len(changed) == len(content)
    return changed


def test_an_exported_archive_is_read(archive: Path) -> None:
    assert _read_pt2_metadata(archive) == TOLD


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("first", [True, False])
def test_a_part_that_is_there_twice(archive: Path, tmp_path: Path, first: bool) -> None:
    parts = read(archive)
    name, content = next((name, content) for name, content in parts if name.endswith(CONFIG))
    twice = (name, as_pickles(content))
    path = write(tmp_path / "bad.pt2", [twice, *parts] if first else [*parts, twice])
    with pytest.raises(UserError, match="holds a part twice, or two programs; it was not loaded"):
        ExportedPredictor(path, trust=True)


@pytest.mark.parametrize("first", [True, False])
def test_two_folders(archive: Path, tmp_path: Path, first: bool) -> None:
    parts = read(archive)
    other = [("other/" + name.partition("/")[2], content) for name, content in parts if "extra" not in name]
    other = [(name, as_pickles(content) if name.endswith(CONFIG) else content) for name, content in other]
    path = write(tmp_path / "bad.pt2", other + parts if first else parts + other)
    with pytest.raises(UserError, match="holds a part twice, or two programs; it was not loaded"):
        ExportedPredictor(path, trust=True)


def test_an_archive_behind_another(archive: Path, tmp_path: Path) -> None:
    """Python reads the second, whose offsets begin anew; PyTorch finds the list of the first there."""
    parts = [
        (name, as_pickles(content) if name.endswith(CONFIG) else content) for name, content in read(archive)
    ]
    evil = write(tmp_path / "evil.pt2", parts)
    path = tmp_path / "bad.pt2"
    path.write_bytes(evil.read_bytes() + archive.read_bytes())
    assert dict(read(path)) == dict(read(archive))
    with pytest.raises(UserError, match="holds weights as pickles, which are not loaded"):
        ExportedPredictor(path, trust=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pt2").write_bytes(content)
    with pytest.raises(UserError, match="is no detector that gn_detect exported"):
        ExportedPredictor(tmp_path / "bad.pt2", trust=True)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": BOMB},
        {"config": "a: " + "[" * 100_000},
        {"config": "# " + "x" * 10_000_000},
        {"config": "SEED: !!bool maybe"},
        {"class_names": "[" * 100_000},
        {"category_ids": "[1" + "0" * 5000 + "]"},
    ],
)
def test_small_metadata_do_not_become_large(changes: dict[str, str]) -> None:
    strings = {
        "config": dump_config(load_config(overrides=["MODEL.ROI_HEADS.NUM_CLASSES", "1"])),
        "class_names": '["a"]',
        "category_ids": "[1]",
        "size_divisibility": "32",
        "gn_detect_version": "1",
    }
    assert ExportMetadata.from_strings(strings, Path("m.onnx")).class_names == ["a"]
    with pytest.raises(UserError, match=r"m\.onnx is no detector that gn_detect exported"):
        ExportMetadata.from_strings({**strings, **changes}, Path("m.onnx"))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("size_divisibility", "0"), ("size_divisibility", "-32"), ("size_divisibility", "1" + "0" * 400),
        ("size_divisibility", "x"), ("size_divisibility", "1e9"), ("class_names", "[1, 2]"),
        ("class_names", "{}"), ("class_names", '"ab"'), ("class_names", "[" * 1000), ("class_names", '["a"]'),
        ("category_ids", '["1", "2"]'), ("category_ids", "[true, false]"), ("category_ids", "null"),
        ("config", "x"), ("config", "[]"), ("config", "MODEL: 5"),
    ],
)  # fmt: skip
def test_metadata_of_other_types_are_refused(tmp_path: Path, key: str, text: str) -> None:
    reported = {
        "config": (write_config(tmp_path)).read_text(), "class_names": '["a", "b"]', "category_ids": "[1, 2]",
        "size_divisibility": "32", "gn_detect_version": "1",
    }  # fmt: skip
    assert ExportMetadata.from_strings(reported, Path("m.onnx")).size_divisibility == 32
    with pytest.raises(UserError, match=r"m\.onnx is no detector that gn_detect exported"):
        ExportMetadata.from_strings(reported | {key: text}, Path("m.onnx"))


def test_outputs_that_are_no_detections_are_told_from_detections() -> None:
    boxes, scores, labels = torch.zeros(2, 4), torch.zeros(2), torch.tensor([0, 1])
    assert _is_of(2, [boxes, scores, labels])
    assert _is_of(2, [boxes, scores, labels, torch.zeros(2, 28, 28)])
    assert _is_of(2, [boxes[:0], scores[:0], labels[:0]])
    for outputs in (
        [boxes, scores], [boxes, scores, labels + 1], [boxes, scores, labels - 1],
        [boxes, scores[:1], labels],
        [boxes[:, :3], scores, labels], [boxes, scores, scores], [boxes, scores, labels, scores],
    ):  # fmt: skip
        assert not _is_of(2, outputs)


def test_an_exported_detector_takes_tiles(tmp_path: Path) -> None:
    """Its program sees each tile, and its detections are merged as those of a model."""
    exported = ExportedPredictor.__new__(ExportedPredictor)
    exported.cfg = load_config(write_config(tmp_path), ["INPUT.MIN_SIZE_TEST", "0"])
    exported.class_names, exported.category_ids, exported._divisibility = ["square", "bar"], [3, 7], 32
    sizes = []

    def find_bright(image: torch.Tensor, size: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(size.tolist())
        rows, columns = (image[0, 0] > 150).any(1).nonzero()[:, 0], (image[0, 0] > 150).any(0).nonzero()[:, 0]
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else []
        boxes = torch.tensor(box).float().reshape(-1, 4)
        return [boxes, torch.full((len(boxes),), 0.9), torch.ones(len(boxes)).long()]

    exported._program = find_bright
    pixels = np.zeros((64, 160, 3), np.uint8)
    pixels[20:40, 50:110] = 200
    found = exported(pixels, tile=64, overlap=0.25)
    assert sizes == [[64, 64]] * 3
    assert found.boxes.tolist() == [[50, 20, 110, 40]]
    assert exported(pixels).boxes.tolist() == [[50, 20, 110, 40]]
    assert sizes[3:] == [[64, 160]]
