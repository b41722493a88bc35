"""``gn-detect compare``: values, intervals, groups, and what cannot be compared."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gn_detect.cli import main
from gn_detect.config import dump_config, load_config
from gn_detect.errors import UserError
from gn_detect.report.comparison import Difference, compare_runs, conclusion

MakeRun = Callable[..., Path]


def other_run(run: Path, name: str, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """A copy of a run with other detections."""
    folder = run.parent / name
    shutil.copytree(run, folder)
    path = folder / "inference" / "tiny_test" / "coco_instances_results.json"
    detections = json.loads(path.read_text())
    change(detections)
    path.write_text(json.dumps(detections))
    return folder


def worse(detections: list[dict[str, Any]]) -> None:
    """Every box far off."""
    for detection in detections:
        detection["bbox"] = [0, 0, 3, 3]


def test_a_run_and_itself_do_not_differ(make_run: MakeRun) -> None:
    run = make_run(["a", "b"])
    (comparison,) = compare_runs([run], [run], resamples=50)
    assert comparison.images == 4
    results = json.loads((run / "inference" / "tiny_test" / "results.json").read_text())
    for kind, rows in comparison.kinds.items():
        assert {row.name for row in rows} == {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-a", "AP-b"}
        for row in rows:
            expected = results[kind][row.name]
            assert row.first == pytest.approx(np.nan if expected is None else expected, nan_ok=True)
            if expected is not None:
                assert (row.difference, row.low, row.high) == (0, 0, 0)
                assert not row.is_real


def test_a_page_against_another_run(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """The other run finds nothing in the first image, and image 4 with 2 objects as this one does not."""

    def change(detections: list[dict[str, Any]]) -> None:
        del detections[:2]

    run = make_run(["a", "b"])
    other = other_run(run, "other <b>", change)
    assert main(["report", str(run), "--against", str(other), "--pictures", "1"]) == 0
    assert re.search(r"see .*report\.html \(\d+ kB\)", capsys.readouterr().out)
    text = (run / "report.html").read_text()
    assert "Against other &lt;b&gt;" in text
    assert text.count('<b class="gained">') == 1
    assert "001.png · quality 100.0 (+100.0)" in text
    assert '<b class="lost">' not in text
    assert "box AP: " in text
    shutil.rmtree(other / "inference")
    assert main(["report", str(run), "--against", str(other)]) == 0
    assert "No comparison: " in (run / "report.html").read_text()


def test_a_run_that_finds_nothing_is_worse(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(["a", "b"])
    other = other_run(run, "other", worse)
    (comparison,) = compare_runs([run], [other], resamples=200)
    boxes, masks = comparison.kinds["bbox"][0], comparison.kinds["segm"][0]
    assert boxes.second == 0
    assert boxes.difference == pytest.approx(-boxes.first)
    assert boxes.high < 0
    assert boxes.is_real
    assert not masks.is_real, "masks are the same"
    assert main(["compare", str(run), str(other), "--resamples", "200"]) == 0
    text = capsys.readouterr().out
    assert "AP: the first is better by" in text
    assert "AP: no difference that 4 images can tell" in text
    assert main(["compare", str(run), str(other), "--resamples", "200", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["datasets"]
    assert found["bbox"]["AP"]["interval"] == pytest.approx([boxes.low, boxes.high])
    assert found["bbox"]["AP"]["real"] is True


def test_groups_have_the_mean_of_their_runs_and_wider_intervals(make_run: MakeRun) -> None:
    run = make_run(["a", "b"])
    others = [other_run(run, "one", worse), other_run(run, "two", lambda found: found.clear())]
    (alone,) = compare_runs([run], others[:1], resamples=300)
    (grouped,) = compare_runs([run, others[0]], [run, *others], resamples=300)
    single, row = alone.kinds["bbox"][0], grouped.kinds["bbox"][0]
    assert row.first == pytest.approx(single.first / 2)
    assert row.second == pytest.approx(single.first / 3)
    assert row.low < row.difference < row.high
    assert not row.is_real, "the runs of each side differ more than the sides"


def test_the_same_seed_gives_the_same_intervals(make_run: MakeRun) -> None:
    run = make_run(["a", "b"])
    other = other_run(run, "other", lambda found: found.pop(0) and None)
    first, second = (compare_runs([run], [other], resamples=40, seed=1)[0].kinds["bbox"][0] for _ in range(2))
    assert first == second


def test_other_ground_truth_is_refused(make_run: MakeRun) -> None:
    run = make_run(["a", "b"])
    other = other_run(run, "other", worse)
    cfg = load_config(other / "config.yaml")
    entry = cfg.datasets.registered["tiny_test"]
    path = Path(entry.annotations)
    copy = path.with_name("copy.json")
    copy.write_bytes(path.read_bytes())
    text = dump_config(cfg).replace(str(path), str(copy))
    (other / "config.yaml").write_text(text)
    compare_runs([run], [other], resamples=5)  # another file of the same content
    content = json.loads(copy.read_text())
    del content["annotations"][0]
    copy.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        compare_runs([run], [other], resamples=5)
    assert caught.value.code == "other-run"
    assert "copy.json" in str(caught.value)


def test_runs_without_common_results_are_refused(make_run: MakeRun) -> None:
    run = make_run(["a", "b"])
    other = other_run(run, "other", worse)
    (other / "inference" / "tiny_test" / "coco_instances_results.json").unlink()
    with pytest.raises(UserError) as caught:
        compare_runs([run], [other])
    assert caught.value.code == "no-dataset"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["a"], "missing-argument"),
        (["a", "b", "c"], "extra-argument"),
        (["a", "b", "--resamples", "0"], "bad-argument"),
        (["a", "b", "--seed", "-1"], "bad-argument"),
        (["a", "b"], "not-a-run"),
    ],
)
def test_wrong_arguments(words: list[str], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *words]) == 2
    assert f"[{code}]" in capsys.readouterr().err


def test_sentences() -> None:
    nan = float("nan")
    assert "nothing to find" in conclusion(Difference("AP", nan, nan, nan, nan), 5)
    assert "the second is better by 2.00" in conclusion(Difference("AP", 1.0, 3.0, 0.5, 3.5), 5)
    assert "no difference that 7 images" in conclusion(Difference("AP", 1.0, 3.0, -0.5, 3.5), 7)
