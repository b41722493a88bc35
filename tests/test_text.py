"""Names from files are shown as text: no control character, no line of their own, no mathematics."""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_detect.cli import main
from gn_detect.cli.output import PrintableStream
from gn_detect.convert.report import ConversionReport, LayerReport
from gn_detect.data.coco.faults import DataError
from gn_detect.engine.metrics import EventsWriter, run_log
from gn_detect.errors import UserError
from gn_detect.evaluation.table import format_results
from gn_detect.files import atomic_write_text
from gn_detect.text import Lines, LogFormatter, printable, shortened
from gn_detect.visualize import plot_curves
from gn_detect.weights.load import LoadReport

EVIL = "cat\n12:00:00 ERROR forged\x1b[2J\r\x85\u2028\u202e\ud800\x7f$x_{$"
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_shown_as_text(text: str) -> bool:
    """Return whether a text is one line without hidden characters."""
    return not HIDDEN.search(text.replace("\n", "").replace("\t", "")) and "\nERROR" not in text


def test_hidden_characters_become_escapes() -> None:
    assert printable("a\tb\nc\x1b[0m\x9b\u202e\u2028\ud83d") == r"a\tb\nc\x1b[0m\x9b\u202e\u2028\ud83d"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    for good in ("Müller", "人", "🐈‍⬛", "a b", "$5_^\\", "عربي"):
        assert printable(good) == good
    assert not HIDDEN.search(printable(EVIL))
    assert shortened("x" * 100 + " 0.93") == "x" * 51 + "…xxx 0.93"
    assert shortened("short") == "short"


def test_errors_are_one_line() -> None:
    for error in (UserError("malformed", f"category {EVIL}"), DataError("malformed", f"category {EVIL}")):
        assert not HIDDEN.search(str(error))
        assert r"cat\n12:00:00 ERROR forged\x1b[2J" in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def log_of(message: str, *arguments: object) -> str:
    record = logging.LogRecord("gn_detect", logging.WARNING, "", 0, message, arguments, None)
    before = record.args
    text = LogFormatter("%(levelname)s %(message)s").format(record)
    assert record.args is before
    return text


def test_a_name_makes_no_line_of_a_log() -> None:
    for argument in (EVIL, Path("folder", EVIL), ValueError(EVIL)):
        text = log_of("%s: %d found, %.1f s", argument, 3, 1.5)
        assert not HIDDEN.search(text)
        assert text.endswith(": 3 found, 1.5 s")
    assert log_of("%s\n%s", EVIL, Lines("a\n\tb")).count("\n") == 2
    assert log_of("two\nlines") == "WARNING two\nlines"
    assert "\x1b" not in log_of("own lines: %s", LoadReport(Path(EVIL)))


def test_log_files_take_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_log() as log:
        log.open(tmp_path / "log.txt")
        logging.getLogger("gn_detect.test").warning("class %s", EVIL)
    (line,) = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert r"WARNING class cat\n12:00:00 ERROR forged" in line
    assert not HIDDEN.search(line)


def test_tables_have_a_row_for_a_name() -> None:
    rows = {f"AP-{name}": 1.0 for name in ("dog", EVIL)}
    numbers = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"), 1.0)
    numbers |= dict.fromkeys(("ARs", "ARm", "ARl"), 1.0)
    plain = format_results({"bbox": {**numbers, "AP-dog": 1.0, "AP-cat": 1.0}})
    table = format_results({"bbox": {**numbers, **rows}})
    assert table.count("\n") == plain.count("\n")
    assert not HIDDEN.search(table.replace("\n", ""))
    layer = LayerReport(EVIL, "BatchNorm2d", channels=4, groups=2, eps=1e-5, init="own", trainable=True)
    text = str(ConversionReport([layer]))
    assert not HIDDEN.search(text.replace("\n", ""))
    assert text.count("\n") == 2
    report = LoadReport(Path(EVIL), matched=["a"], missing=[EVIL], unexpected=[EVIL])
    assert str(report).count("\n") == 2
    assert not HIDDEN.search(str(report).replace("\n", ""))


def test_output_shows_what_a_terminal_lacks_as_escapes() -> None:
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = PrintableStream(ascii_stream)
    print("a\tü\x1b[31m\ud800", file=stream)
    stream.flush()
    assert ascii_stream.buffer.getvalue() == b"a\t\\xfc\\x1b[31m\\ud800\n"


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_the_doctor_shows_names_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    name = "a\n0 errors\x1b[2J\u202e.png"
    Image.new("RGB", (96, 64)).save(tmp_path / name, format="PNG")
    content = {
        "images": [
            {"id": 1, "file_name": name, "width": 90, "height": 64},
            {"id": 2, "file_name": "gone\n\x1b[31m\ud800.png", "width": 96, "height": 64},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": EVIL}, {"id": 2, "name": "_b$c"}],
    }
    (tmp_path / "t.json").write_text(json.dumps(content))
    report = tmp_path / "r.json"
    arguments = [str(tmp_path / "t.json"), "--images", str(tmp_path), "--no-masks"]
    assert main([*flag, "doctor", *arguments, "--report", str(report)]) == 0
    printed = capsys.readouterr()
    assert not HIDDEN.search((printed.out + printed.err).replace("\n", ""))
    assert not any(line.startswith("0 errors") for line in (printed.out + printed.err).splitlines())
    assert report.with_suffix(".png").is_file()
    assert sys.stdout is not None


def test_an_error_of_the_command_line_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a\nerror: all is well\x1b[2J.json"
    path.write_text("{")
    assert main(["doctor", str(path), "--no-images"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert r"a\nerror: all is well\x1b[2J.json is not JSON" in error


NAMES = [
    "cost_$5_$9",
    "_hidden",
    "$\\frac{1}{$",
    "a\nb",
    "x" * 500,
    "\U0001f408",
    "\ud800",
    "%s {0}",
    "\\a{x}",
]


@pytest.mark.parametrize("suffix", [".png", pytest.param(".svg", marks=pytest.mark.slow)])
def test_any_name_of_a_dataset_or_a_run_is_drawn(tmp_path: Path, suffix: str) -> None:
    row: dict[str, float] = {"total_loss": 1.0}
    for name in NAMES:
        row |= {f"loss_{name}": 0.5, f"{name}/bbox/AP": 3, f"{name}/segm/AP": 2}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"iteration": i, **row}) + "\n" for i in range(3)))
    plot_curves(metrics, tmp_path / f"one{suffix}")
    plot_curves(dict.fromkeys([*NAMES, "_other"], metrics), tmp_path / f"two{suffix}")
    assert (tmp_path / f"one{suffix}").stat().st_size
    assert (tmp_path / f"two{suffix}").stat().st_size


def test_a_legend_lists_names_as_they_are(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from gn_detect.visualize.fonts import add_legend

    figure = Figure()
    names = ["_hidden", "cost_$5_$9", "a\nb", "y" * 500]
    add_legend(figure, [Line2D([], []) for _ in names], names)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == ["_hidden", "cost_$5_$9", r"a\nb"]
    assert len(texts[3]) == 60
    assert not any(text.get_parse_math() or text.get_usetex() for text in figure.legends[0].get_texts())


def test_tensorboard_and_files_take_halves_of_characters(tmp_path: Path) -> None:
    events = EventsWriter(tmp_path, 0)
    events.write(1, {f"{EVIL}/bbox/AP": 1.0})
    events.add_picture(EVIL, np.zeros((4, 4, 3), dtype=np.uint8), 1)
    events.close()
    atomic_write_text(tmp_path / "page.html", "<p>\ud800</p>")
    assert (tmp_path / "page.html").read_bytes() == b"<p>\\ud800</p>"
