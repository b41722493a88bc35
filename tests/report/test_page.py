"""The page has the right content, and nothing of a run's data becomes markup."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gn_detect.cli import main
from gn_detect.config.schema import known_keys
from gn_detect.errors import UserError
from gn_detect.evaluation import ERRORS, read_truth
from gn_detect.report import write_report
from gn_detect.report.analysis import analyse, condense
from gn_detect.report.page import HELP
from gn_detect.report.pictures import choose_images

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def pictures_of(page: Page) -> int:
    return sum((attributes.get("src") or "").startswith("data:image/webp") for _, attributes in page.tags)


@pytest.mark.usefixtures("real_curves")
def test_the_command_writes_one_page(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run()
    assert main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    page = read(folder / "report.html")
    for words in ("box AP", "mask AP50", "Precision by recall", "Confusion", "Worst and best", "By category"):
        assert words in page.words
    assert "SOLVER:" in page.words
    assert "images per second" in page.words
    text = (folder / "report.html").read_text()
    metrics = json.loads((folder / "inference" / "tiny_test" / "results.json").read_text())
    for row in metrics.values():
        assert all(f">{row[name]:.1f}</td>" in text for name in ("AP", "AP50", "AP75", "AR100"))
    assert main(["report", "--json", str(folder), "--pictures", "0"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {
        "output": str(folder / "report.html"),
        "bytes": (folder / "report.html").stat().st_size,
    }


def test_the_best_evaluation_is_named_if_it_was_not_the_last(make_run: MakeRun) -> None:
    folder = make_run()
    metrics, losses = folder / "metrics.jsonl", (folder / "metrics.jsonl").read_text()

    def words(*values: float | None) -> str:
        rows = [{"iteration": 2 * i + 1, "segm/AP": value} for i, value in enumerate(values)]
        metrics.write_text(losses + "".join(json.dumps(row) + "\n" for row in rows))
        return read(write_report(folder, pictures=0)).words

    best = "segm/AP was best after 4 iterations: 30.00, kept as model_best.pth; the last evaluation, after 6,"
    assert f"{best} found 20.00." in words(10, 30, 20)
    assert f"{best} found 30.00." in words(10, 30, 30)  # of equal ones the first is kept
    assert "was best" not in words(10, 20, 30)
    assert "was best" not in words(None, None)


@pytest.mark.usefixtures("real_curves")
def test_nothing_of_the_data_becomes_markup(make_run: MakeRun) -> None:
    page = read(write_report(make_run()))
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    assert not [a for tag, a in page.tags if tag == "b" and "9" in a]
    assert "<script>document.title='taken over'</script>" in page.words.replace("\n", "")
    assert "<b>9</b>" in page.words
    handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert handlers == []
    # Nor does it need the network or another file.
    addresses = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data") if a.get(key)]
    assert len([a for a in addresses if a.startswith("data:image/webp;base64,")]) == 4
    assert all(a.startswith(("data:", "#")) for a in addresses)
    style = re.sub(r"data:[^)]*", "", "".join(re.findall(r"<style>(.*?)</style>", page.rawdata, re.S)))
    assert "url(" not in style
    assert "@import" not in style


def test_missing_parts_are_said(make_run: MakeRun) -> None:
    page = read(write_report(make_run(evaluated=False, trained=False)))
    assert "has not been evaluated yet" in page.words
    assert "no metrics.jsonl" in page.words
    assert "did not record its environment" in page.words


def test_a_dataset_that_is_gone_leaves_the_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    (tmp_path / "val" / "annotations.json").rename(tmp_path / "moved.json")
    page = read(write_report(folder))
    assert "annotations.json is missing" in page.words
    assert "mask AP50" in page.words
    assert "Worst and best" not in page.words


def test_an_image_that_is_gone_is_named_in_its_place(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    (tmp_path / "val" / "images" / "003.png").unlink()
    page = read(write_report(folder))
    assert "003.png is missing" in page.words
    assert len([1 for tag, a in page.tags if tag == "img" and a.get("src")]) == 3


def test_bad_input_is_refused_without_a_page(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        write_report(tmp_path)
    folder = make_run()
    (folder / "inference" / "tiny_test" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("several", [False, True])
def test_results_with_test_time_augmentation_are_shown_if_they_are_of_the_same_evaluation(
    make_run: MakeRun, several: bool
) -> None:
    folder = make_run()
    plain = json.loads((folder / "inference" / "tiny_test" / "results.json").read_text())
    augmented = {f"{kind}_TTA": {**row, "AP": 87.65} for kind, row in plain.items()}

    def shown(results: dict[str, Any]) -> str:
        whole = {"tiny_test": results, "other": results} if several else results
        (folder / "results.json").write_text(json.dumps(whole))
        return read(write_report(folder)).words

    words = shown({**plain, **augmented})
    assert "mask (TTA)" in words
    assert "87.65" in words or "87.7" in words
    assert "test-time augmentation" in words
    assert "TTA" not in shown(plain)
    earlier = {**plain, "bbox": {**plain["bbox"], "AP": 1.0}}
    assert "TTA" not in shown({**earlier, **augmented})


def test_every_test_set_has_a_part_of_its_own(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    config = (folder / "config.yaml").read_text()
    content = yaml.safe_load(config)
    content["DATASETS"]["REGISTER"]["other"] = content["DATASETS"]["REGISTER"]["tiny_test"]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    shutil.copytree(folder / "inference" / "tiny_test", folder / "inference" / "other")
    results = folder / "inference" / "other" / "coco_instances_results.json"
    results.write_text(json.dumps(json.loads(results.read_text())[:1]))
    page = read(write_report(folder))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert "tiny_test" in page.words
    assert "other" in page.words
    assert page.words.count("Precision by recall") == 2
    assert pictures_of(page) == 2 * 4


@pytest.mark.parametrize("polygons", [pytest.param(False, marks=pytest.mark.slow), True])
def test_results_of_masks_alone_are_drawn(make_run: MakeRun, polygons: bool) -> None:
    folder = make_run()
    inference = folder / "inference" / "tiny_test"
    entries = json.loads((inference / "coco_instances_results.json").read_text())
    for entry in entries:
        x, y, width, height = entry.pop("bbox")
        if polygons:
            entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    (inference / "coco_instances_results.json").write_text(json.dumps(entries))
    metrics = json.loads((inference / "results.json").read_text())
    (inference / "results.json").write_text(json.dumps({"segm": metrics["segm"]}))
    page = read(write_report(folder))
    assert "mask AP50" in page.words
    assert pictures_of(page) == 4


def test_mistakes_are_counted(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(["square", "bar"])
    truth = read_truth(tmp_path / "val" / "annotations.json", "segm")
    results = folder / "inference" / "tiny_test" / "coco_instances_results.json"
    analysis = analyse(truth, results, ("bbox", "segm"), 0.5)
    counts = [tuple(image.counts.values()) for image in analysis.images]
    names = ("objects", "found", "other class", "missed", "false")
    assert tuple(analysis.images[0].counts) == names
    assert counts == [(2, 2, 0, 0, 0), (2, 1, 0, 1, 1), (2, 1, 1, 0, 0), (2, 0, 0, 2, 0)]
    assert [image.quality for image in analysis.images] == pytest.approx([1, 0.5, 0.5, 0])
    assert analysis.confusion.tolist() == [[3, 0, 1], [1, 1, 2], [0, 1, 0]]
    assert analysis.object_counts == [4, 4]
    assert sum(analysis.size_counts.values()) == 8
    metrics = json.loads((folder / "inference" / "tiny_test" / "results.json").read_text())
    for kind, curves in analysis.curves.items():
        for key, name in (("AP", "0.50:0.95"), ("AP50", "0.50"), ("AP75", "0.75")):
            assert 100 * curves[name].mean() == pytest.approx(metrics[kind][key])


def test_errors_and_scores_have_a_part(make_run: MakeRun) -> None:
    """One box is moved away, one has the other class, and an image has no detection."""
    page = read(write_report(make_run(["square", "bar"])))
    for name in ERRORS:
        assert name in page.words
    assert "What AP50 is lost to" in page.words
    assert "predict --threshold auto" in page.words
    keys = {word.strip("(),.;") for text in HELP.values() for word in text.split() if "." in word[:-1]}
    assert keys <= set(known_keys())


def test_worst_and_best_are_different_images(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    truth = read_truth(tmp_path / "val" / "annotations.json", "segm")
    images = analyse(
        truth, folder / "inference" / "tiny_test" / "coco_instances_results.json", ["segm"], 0.5
    ).images
    chosen = [(rank, image.image_id) for rank, image, _ in choose_images(images, 1)]
    assert chosen == [("worst", 4), ("best", 1)]
    chosen = [image.image_id for _, image, _ in choose_images(images, 3)]
    assert sorted(chosen) == [1, 2, 3, 4]
    assert choose_images(images, 0) == []
    poor = [image for image in images if image.quality == 0] * 2
    assert [rank for rank, *_ in choose_images(poor, 1)] == ["worst"]


def test_large_confusion_matrices_keep_the_worst_categories() -> None:
    confusion = np.diag(np.arange(31))
    confusion[3, 7] = confusion[30, 9] = 5
    condensed, names = condense(confusion, [f"c{i}" for i in range(30)], most=3)
    assert names == ["c3", "c7", "c9", "27 others"]
    assert condensed.shape == (5, 5)
    assert condensed.sum() == confusion.sum()
    assert condensed[0, 1] == 5
    assert condensed[4, 2] == 5
    assert condense(confusion, ["c"] * 30, most=29)[0] is confusion
