"""Curves of one run and of several."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_detect.errors import UserError
from gn_detect.visualize import metric_points, plot_curves, read_metrics
from gn_detect.visualize.curves import Curve, _thinned, draw_chart


def write_metrics(path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"iteration": i, "total_loss": 3 / (i + 1), "loss_cls": 1 / (i + 1), "lr": 0.01, "time": 0.3}
        for i in range(0, 100, 20)
    ]
    rows[2]["loss_cls"] = None
    rows.append({"iteration": 99, "bbox/AP": 40.0, "segm/AP": 41.0, "bbox/AP50": 60.0, "bbox/AP-disc": 3.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 120, "total_lo')


def test_curves_are_plotted(tmp_path: Path) -> None:
    import matplotlib

    settings = dict(matplotlib.rcParams)
    write_metrics(tmp_path / "metrics.jsonl")
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape[1] > pixels.shape[0] > 300
    assert (pixels.min(axis=-1) < 128).any()
    assert (np.ptp(pixels, axis=-1) > 60).any()
    assert pixels[0].min() == 255
    assert dict(matplotlib.rcParams) == settings


def test_the_highest_point_stands_below_the_upper_edge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of a run with one evaluation, whose AP are close to each other."""
    from matplotlib.figure import Figure

    write_metrics(tmp_path / "metrics.jsonl")
    tops: dict[str, float] = {}
    save = Figure.savefig

    def note(self: Figure, *args: Any, **keywords: Any) -> None:
        tops.update({axes.get_title(): axes.get_ylim()[1] for axes in self.axes})
        save(self, *args, **keywords)

    monkeypatch.setattr(Figure, "savefig", note)
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert tops["AP (%)"] > 41.0 * 1.05
    assert tops["loss"] > 3.0 * 1.05


def test_the_loss_on_a_test_set_stands_beside_the_training_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several runs show their training loss alone."""
    from matplotlib.figure import Figure

    file = tmp_path / "metrics.jsonl"
    write_metrics(file)
    text = file.read_text().replace(
        '"bbox/AP"', '"validation/total_loss": 2, "validation/loss_cls": 9, "bbox/AP"'
    )
    file.write_text(text)
    drawn: list[dict[str, np.ndarray]] = []

    def note(self: Figure, *_: Any, **__: Any) -> None:
        drawn.append({axes.get_title(): [line.get_ydata() for line in axes.lines] for axes in self.axes})

    monkeypatch.setattr(Figure, "savefig", note)
    plot_curves(file, tmp_path / "one.png")
    plot_curves({"a": file, "b": file}, tmp_path / "two.png")
    assert [values.tolist() for values in drawn[0]["loss"]].count([2.0]) == 1
    assert len(drawn[0]["loss"]) == 3
    assert len(drawn[1]["loss"]) == 2


@pytest.mark.parametrize("content", [None, "", '{"iteration": 3, "time": 1.0}\n', "\x00\n[1]\n"])
def test_nothing_to_plot_is_an_error_without_a_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def write_run(path: Path, scale: float) -> Path:
    rows: list[dict[str, Any]] = [
        {"iteration": i, "total_loss": scale / (i + 1), "loss_cls": 1.0, "lr": 0.01} for i in range(0, 100, 5)
    ]
    rows.append({"iteration": 99, "bbox/AP": 40.0 / scale, "segm/AP": 41.0 / scale})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_runs_share_one_figure(tmp_path: Path) -> None:
    """SVG keeps text and curves, so they can be counted: each run is named once, whatever its name."""
    runs = {
        name: write_run(tmp_path / f"{i}.jsonl", i + 1.0) for i, name in enumerate(["gn", "$b_n$", "a<b"])
    }
    plot_curves(runs, tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text()
    assert svg.count("<!-- gn -->") == 1
    assert svg.count("<!-- $b_n$ -->") == 1
    assert svg.count("a&lt;b") == 1
    assert all(svg.count(f"<!-- {name} -->") == 1 for name in ("loss", "bbox/AP", "segm/AP", "learning rate"))
    again = tmp_path / "again.svg"
    plot_curves(runs, again)
    assert again.read_text() == svg


def test_the_axes_hold_the_curves_of_all_runs(tmp_path: Path) -> None:
    """A run with larger losses than the first one's is not cut off."""
    low, high = write_run(tmp_path / "low.jsonl", 1.0), write_run(tmp_path / "high.jsonl", 50.0)
    plot_curves({"first": low, "second": high}, tmp_path / "curves.svg")
    assert "<!-- 50 -->" in (tmp_path / "curves.svg").read_text(), "no tick for the largest loss"


def test_a_run_without_numbers_among_others_is_named(tmp_path: Path) -> None:
    full, empty = write_run(tmp_path / "full.jsonl", 1.0), tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl has neither"):
        plot_curves({"a": full, "b": empty}, tmp_path / "curves.png")
    with pytest.raises(UserError, match=r"must end in \.png, \.svg"):
        plot_curves(full, tmp_path / "curves.gif")
    assert [p.name for p in tmp_path.glob("curves*")] == []


def test_a_long_run_is_read_and_drawn_in_seconds(tmp_path: Path) -> None:
    """Numbers stay exact; only the picture leaves points out."""
    count = 100_000
    loss = np.random.default_rng(0).random(count).tolist()
    line = '{"iteration": %d, "total_loss": %r, "loss_cls": 0.5, "lr": 0.01}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line % (i, value) for i, value in enumerate(loss)))
    begin = time.process_time()
    plot_curves(path, tmp_path / "curves.png", smooth=50_000)
    assert time.process_time() - begin < 8  # 2; it was 200
    rows = read_metrics(path)
    assert metric_points(rows, "total_loss")[:, 1].tolist() == loss
    assert metric_points(rows, "total_loss", 50_000)[-1, 1] == pytest.approx(
        np.mean(loss[50_000:]), rel=1e-12
    )


@pytest.mark.parametrize("smooth", [2, 3, 8, 100])
def test_means_leave_out_what_is_not_finite(tmp_path: Path, smooth: int) -> None:
    values = [1.0, math.nan, 4.0, math.nan, math.nan, math.nan, 7.0, 1e38, -2.0, 3.0]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"iteration": i, "x": x}) + "\n" for i, x in enumerate(values)))
    metrics = read_metrics(path)
    windows = [values[max(0, i - smooth + 1) : i + 1] for i in range(len(values))]
    finite = [[value for value in window if math.isfinite(value)] for window in windows]
    expected = [sum(window) / len(window) if window else math.nan for window in finite]
    assert metric_points(metrics, "x", smooth)[:, 1].tolist() == pytest.approx(expected, nan_ok=True)


def test_the_highest_point_of_a_long_curve_is_drawn() -> None:
    line = np.stack([np.arange(100_001.0), np.zeros(100_001)], axis=1)
    line[77_777, 1], line[88_888, 1], line[90_000:95_000, 1] = 5, -3, math.nan
    thinned = _thinned(line)
    assert len(thinned) < 9000
    assert thinned[0, 0] == 0
    assert thinned[-1, 0] == 100_000
    assert np.nanmax(thinned[:, 1]) == 5
    assert np.nanmin(thinned[:, 1]) == -3
    assert np.isnan(thinned[:, 1]).any()


def test_lines_that_are_whole_only_together_are_damaged(tmp_path: Path) -> None:
    lines = [
        b'{"iteration": 0, "lr": 1}',
        b'{"iteration": 1}, [{}',
        b"{}]",
        b'{"iteration": 2, "a}',
        b'{b": 1}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b"", b"\xff", b'{"iteration": 7}']))
    assert metric_points(read_metrics(tmp_path / "metrics.jsonl"), "iteration")[:, 1].tolist() == [0, 7]


LINES = [
    '{"a": : 1}',
    '{"a" 1}',
    '{"a": 1, "a": 2, "iteration": 3}',
    '{"iteration": 1, "a": 2,}',
    '{"iteration": 1, "a": }',
    '{"iteration": 1, "a": +2}',
    '{"iteration": 1, "a": 1_0}',
    '{"iteration": 1, "a": .5}',
    '{"iteration": 1, "a": 01}',
    '{"iteration": 1, "a": 1 2}',
    '{"a": 2, "iteration": 1}',
    '{"iteration":1,"a":2}',
    ' {"iteration": 1, "a": 2}',
    '{"iteration": 1, "a\\u0062": 2}',
    '{"iteration": 1, "b": 2}',
    '{"iteration": 1, "a": 1e400}',
    '{"iteration": 1}}',
    '{"iteration": 1, "a": null}',
    '{"iteration": 1, "a": 1' + "0" * 400 + "}",
    '{"iteration": 1, "a": -}',
]


def points_of(lines: list[str]) -> dict[str, list[list[float]]]:
    """Iterations and values by name, read line by line."""
    points: dict[str, list[list[float]]] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            for name, value in row.items() if "iteration" in row else ():
                finite = value is not None and abs(value) < 3e38
                points.setdefault(name, []).append([row["iteration"], value if finite else math.nan])
    return points


@pytest.mark.parametrize("line", LINES)
def test_lines_are_read_together_as_one_by_one(tmp_path: Path, line: str) -> None:
    """Lines like those of json.dumps are read together; another one among them changes nothing."""
    for place in (0, 50, 99):
        lines = [f'{{"iteration": {i}, "a": {i / 7}}}' for i in range(99)]
        lines.insert(place, line)
        path = tmp_path / "metrics.jsonl"
        path.write_text("\n".join(lines) + "\n")
        metrics, expected = read_metrics(path), points_of(lines)
        assert metrics.names == list(expected)
        assert metrics.last == 98
        for name, points in expected.items():
            np.testing.assert_array_equal(metric_points(metrics, name), points)


def test_charts_break_at_missing_values_and_show_names_as_text() -> None:
    points = np.array([[0, 1.0], [1, np.nan], [2, 3.0], [3, 4.0]])
    name = '</title><script>$x_{$ id="a_1"'
    svg = draw_chart([Curve(name, points, 9), Curve("b", points, 1, "3")], "recall", "key", x_range=(0, 3))
    first, second = re.findall(r'<g class="line colour1".*?</g>', svg, re.S)
    path = re.search(r' d="([^"]*)"', first)
    assert path
    assert path[1].count("M") == 2
    assert path[1].count("L") == 1
    assert "<title>&lt;/title&gt;&lt;script&gt;$x_{$ id=&quot;a_1&quot;</title>" in first
    assert 'data-group="3" hidden' in second
    assert "hidden" not in first
    assert re.findall(r">([^<>\n]+)</text>", svg)[:3] == ["0.0", "0.5", "1.0"]
    empty = draw_chart([Curve("a", np.full((2, 2), np.nan), 0)], "recall", "key", x_range=(0, 1))
    assert "NaN" not in empty
    assert "nan" not in empty


def test_of_a_huge_file_some_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation and the end are among them."""
    lines = [
        {"iteration": i, "total_loss": 1.0} | ({"segm/AP": 30.0} if i % 700 == 699 else {})
        for i in range(5000)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr("gn_detect.visualize.metrics._MOST_BYTES", path.stat().st_size // 4)
    metrics = read_metrics(path)
    assert metrics.last == 4999
    assert metric_points(metrics, "segm/AP")[:, 0].tolist() == list(range(699, 5000, 700))
    assert 900 < len(metric_points(metrics, "total_loss")) < 1300
