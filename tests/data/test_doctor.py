"""The doctor finds each fault, names what it is about, and repairs what can be repaired."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_detect.data import CocoDataset, DatasetSource
from gn_detect.data.coco.faults import ERROR, FAULTS, NOTE, Finding
from gn_detect.data.doctor.report import Diagnosis, examine, leaked_paths
from gn_detect.errors import UserError

Write = Callable[[Any], DatasetSource]
Spoil = Callable[[dict[str, Any]], Any]


def of_annotation(number: int, **fields: Any) -> Spoil:
    """Sets fields of the annotation with this position."""
    return lambda content: content["annotations"][number].update(fields)


def of_image(number: int, **fields: Any) -> Spoil:
    return lambda content: content["images"][number].update(fields)


def again(part: str, **fields: Any) -> Spoil:
    """The first entry once more, with other fields."""
    return lambda content: content[part].append({**content[part][0], **fields})


BOW = [[10, 10, 40, 30, 40, 10, 10, 30]]


def one_fraction(content: dict[str, Any]) -> None:
    """An object of half a pixel among thirty larger ones."""
    small = {"bbox": [0.1, 0.1, 0.5, 0.5], "segmentation": [[0.1, 0.1, 0.6, 0.1, 0.6, 0.6]], "area": 0.2}
    content["annotations"][0].update(small)
    for x in range(5, 35):
        outline = [[x, 4, x + 20, 4, x + 20, 24, x, 24]]
        other = {"id": 100 + x, "bbox": [x, 4, 20, 20], "segmentation": outline}
        content["annotations"].append({**content["annotations"][-1], **other})


RLE = {"size": [60, 90], "counts": [0, 5400]}
FOUND: dict[str, tuple[str, Spoil, dict[str, Any]]] = {
    "no file name": ("malformed", lambda c: c["images"][0].pop("file_name"), {"image_id": 7}),
    "no bbox": (
        "malformed",
        lambda c: [c["annotations"][0].pop(key) for key in ("bbox", "segmentation")],
        {},
    ),
    "list id": ("malformed", of_annotation(0, id=[1]), {}),
    "huge id": ("malformed", of_annotation(0, image_id=2**63), {"annotation_id": 1}),
    "no objects": ("empty-list", lambda c: c["annotations"].clear(), {}),
    "category twice": ("duplicate-category-id", again("categories"), {"category_id": 9}),
    "image twice": ("duplicate-image-id", again("images"), {"image_id": 7}),
    "annotation twice": ("duplicate-annotation-id", again("annotations", image_id=11), {"annotation_id": 1}),
    "unlisted image": ("dangling-image", of_annotation(0, image_id=8), {"annotation_id": 1, "image_id": 8}),
    "unlisted category": ("dangling-category", of_annotation(0, category_id=5), {"category_id": 5}),
    "no height": ("image-size", of_image(0, height=0), {"image_id": 7}),
    "impossible size": ("image-size", of_image(0, height=10**7), {"image_id": 7}),
    "outside": (
        "image-outside",
        of_image(0, file_name=os.path.abspath(__file__)),
        {"image_id": 7, "file_name": os.path.abspath(__file__)},
    ),
    "missing": ("missing-image", of_image(0, file_name="gone.png"), {"image_id": 7, "file_name": "gone.png"}),
    "other name": ("misnamed-image", of_image(0, file_name="C:\\me\\7.PNG"), {"image_id": 7}),
    "other size": ("size-differs", of_image(0, height=61), {"image_id": 7}),
    "negative box": ("bad-box", of_annotation(0, bbox=[9, 9, -5, 5]), {"annotation_id": 1}),
    "box outside": ("box-outside", of_annotation(0, bbox=[90, 0, 5, 5]), {"annotation_id": 1, "image_id": 7}),
    "crowd 2": ("bad-flag", of_annotation(0, iscrowd=2), {"annotation_id": 1}),
    "ignore": ("bad-flag", of_annotation(0, ignore=1), {"annotation_id": 1}),
    "fractions": (
        "fractions",
        lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]],
        {},
    ),
    "one fraction": ("some-fractions", lambda c: one_fraction(c), {"annotation_id": 1}),
    "infinite area": ("bad-area", of_annotation(0, area=float("inf")), {"annotation_id": 1}),
    "no mask": ("no-mask", of_annotation(0, segmentation=[]), {"annotation_id": 1}),
    "far polygon": (
        "bad-polygon",
        of_annotation(0, segmentation=[[1, 1, 1e300, 1, 5, 5]]),
        {"annotation_id": 1},
    ),
    "RLE size": ("rle-size", of_annotation(0, segmentation=RLE | {"size": [90, 60]}), {"annotation_id": 1}),
    "RLE sum": ("bad-rle", of_annotation(0, segmentation=RLE | {"counts": [1]}), {"annotation_id": 1}),
    "RLE text": ("bad-rle", of_annotation(0, segmentation=RLE | {"counts": "oooo"}), {"annotation_id": 1}),
    "flat box": ("box-empty", of_annotation(0, bbox=[10, 10, 30, 0]), {"annotation_id": 1}),
    "wide box": ("box-overlaps-border", of_annotation(0, bbox=[10, 10, 90, 20]), {"annotation_id": 1}),
    "other box": ("box-mask", of_annotation(0, bbox=[10, 10, 30, 26]), {"annotation_id": 1}),
    "other area": ("area-mask", of_annotation(0, area=100), {"annotation_id": 1}),
    "two points": ("short-polygon", of_annotation(0, segmentation=[[1, 1, 5, 5]]), {"annotation_id": 1}),
    "odd": ("short-polygon", of_annotation(0, segmentation=[[1, 1, 5, 5, 9, 9, 3]]), {"annotation_id": 1}),
    "polygon outside": (
        "polygon-outside",
        of_annotation(0, segmentation=[[10, 10, 40, 10, 40, 90]]),
        {"annotation_id": 1},
    ),
    "no pixel": ("empty-mask", of_annotation(0, segmentation=[[10, 10] * 3]), {"annotation_id": 1}),
    "polygon crowd": ("crowd-without-rle", of_annotation(0, iscrowd=1), {"annotation_id": 1}),
    "repeated": ("duplicate-annotation", again("annotations", id=77), {"annotation_id": 77}),
    "file twice": ("duplicate-file", again("images", id=99), {"image_id": 99}),
    "name twice": ("duplicate-category-name", again("categories", id=99), {"category_id": 99}),
    "bow": ("crossing-polygon", of_annotation(0, segmentation=BOW), {"annotation_id": 1}),
    "text number": ("other-form", of_annotation(0, image_id="7"), {}),
    "no area": ("other-form", lambda c: c["annotations"][0].pop("area"), {}),
    "no masks": ("boxes-alone", lambda c: [a.update(segmentation=[]) for a in c["annotations"]], {}),
    "many crowds": ("crowds", lambda c: None, {}),
    "unused": ("unused-category", again("categories", id=99, name="new"), {"category_id": 99}),
    "empty": ("empty-image", lambda c: None, {"image_id": 11}),
}
"""What is done to the small dataset, and what of it the doctor must name."""


@pytest.mark.parametrize("name", FOUND)
def test_each_fault_is_found_and_named(write_dataset: Write, small_coco: dict, name: str) -> None:
    kind, spoil, about = FOUND[name]
    spoil(small_coco)
    diagnosis = examine([write_dataset(small_coco)])
    found = [finding for finding in diagnosis.findings if finding.kind == kind]
    assert any(all(getattr(f, key) == value for key, value in about.items()) for f in found), (
        diagnosis.findings
    )
    assert f"[{kind}]" in str(diagnosis)
    assert FAULTS[kind].remedy in str(diagnosis)


def test_every_kind_of_fault_is_tried() -> None:
    elsewhere = {"unreadable-image", "duplicate-picture", "dark-images", "classes-differ", "leak"}
    assert {kind for kind, _, _ in FOUND.values()} | elsewhere == set(FAULTS)


def test_a_good_dataset_is_healthy(write_dataset: Write, small_coco: dict) -> None:
    small_coco["annotations"].pop(3)  # of a handful a crowd is many
    diagnosis = examine([write_dataset(small_coco)])
    assert diagnosis.healthy
    assert {f.kind for f in diagnosis.findings} == {"empty-image"}
    assert str(diagnosis).startswith("small: 4 images, 4 annotations, 0 crowds, 3 categories\n")
    assert str(diagnosis).endswith("0 errors, 0 warnings, 1 note")


def faults(diagnosis: Diagnosis) -> list[Finding]:
    """Errors and warnings; the fixture has more crowds than a dataset should have."""
    return [f for f in diagnosis.findings if f.severity != NOTE and f.kind != "crowds"]


def test_files_that_cannot_be_read_and_pictures_that_are_equal(
    write_dataset: Write, small_coco: dict
) -> None:
    source = write_dataset(small_coco)
    picture = source.images / "7.png"
    (source.images / "2.png").write_bytes(picture.read_bytes()[:500])
    (source.images / "copy.png").write_bytes(picture.read_bytes())
    small_coco["images"].append({**small_coco["images"][0], "id": 99, "file_name": "copy.png"})
    found = {f.kind: f for f in faults(examine([write_rest(source, small_coco)]))}
    assert found.keys() == {"unreadable-image", "duplicate-picture"}
    assert found["unreadable-image"].image_id == 2
    assert found["unreadable-image"].file_name == "2.png"
    assert found["duplicate-picture"].image_id == 99
    assert "image 7 (7.png)" in found["duplicate-picture"].detail


def save_deep(source: DatasetSource, largest: int, *images: int) -> None:
    """Replaces images by 16-bit greyscale; the last holds ``largest``, the others less than half."""
    for image_id in images:
        with Image.open(source.images / f"{image_id}.png") as old:
            values = np.zeros((old.height, old.width), dtype=np.uint16)
        values[1, 2] = largest if image_id == images[-1] else largest // 2 - image_id
        Image.fromarray(values).save(source.images / f"{image_id}.png")


@pytest.mark.parametrize(("largest", "greys"), [(255, 0), (4095, 15), (16383, 63)])
def test_16_bit_images_that_use_a_small_part_of_their_range(
    write_dataset: Write, small_coco: dict, largest: int, greys: int
) -> None:
    source = write_dataset(small_coco)
    save_deep(source, largest, 2, 7)
    diagnosis = examine([source])
    dark = [finding for finding in diagnosis.findings if finding.kind == "dark-images"]
    assert [finding.detail for finding in dark] == [
        f"no pixel of 2 16-bit greyscale image(s) is {largest + 1} or more of 65535: "
        f"they are read as 0 to {greys} of 255"
    ]
    assert not diagnosis.healthy
    assert "-> scale all of them by one factor, to the whole 16" in str(diagnosis)


def test_16_bit_images_are_judged_together(write_dataset: Write, small_coco: dict) -> None:
    """One may well be dark; 8-bit neighbours do not count."""
    source = write_dataset(small_coco)
    save_deep(source, 255, 2, 11)
    save_deep(source, 16384, 7)
    assert faults(examine([source])) == []
    save_deep(source, 0, 7)
    assert [f.kind for f in faults(examine([source]))] == ["dark-images"]


def write_rest(source: DatasetSource, content: dict) -> DatasetSource:
    source.annotations.write_text(json.dumps(content))
    return source


def test_parts_that_share_pictures_or_differ_in_classes(
    write_dataset: Write, small_coco: dict, tmp_path: Path
) -> None:
    train = write_dataset(small_coco)
    folder = tmp_path / "val"
    folder.mkdir()
    (folder / "other.png").write_bytes((train.images / "5.png").read_bytes())
    content = copy.deepcopy(small_coco)
    content["images"] = [{"id": 1, "file_name": "other.png", "height": 64, "width": 64}]
    content["annotations"] = [{**small_coco["annotations"][4], "image_id": 1}]
    content["categories"][0]["name"] = "tiger"
    val = tmp_path / "val.json"
    val.write_text(json.dumps(content))
    diagnosis = examine([train, DatasetSource("val", val, folder)])
    found = {f.kind: f for f in diagnosis.findings if f.severity == ERROR}
    assert found.keys() == {"leak", "classes-differ"}
    assert found["leak"].detail == "image 1 of val is image 5 of small"
    assert found["classes-differ"].detail.endswith("not among them: tiger")
    content["categories"] = [{"id": 4, "name": "ant"}]  # fewer, under another id: matched by name
    content["annotations"][0]["category_id"] = 4
    val.write_text(json.dumps(content))
    assert "classes-differ" not in examine([train, DatasetSource("val", val, folder)]).kinds()
    assert leaked_paths(diagnosis.parts) == {str(train.images / "5.png")}


def test_without_images_or_masks_less_is_looked_at(write_dataset: Write, small_coco: dict) -> None:
    small_coco["images"][0]["file_name"] = "gone.png"
    del small_coco["annotations"][0]["segmentation"]
    source = write_dataset(small_coco)
    assert {f.kind for f in examine([source]).findings} >= {"missing-image", "no-mask"}
    small_coco["annotations"][1]["segmentation"] = []
    write_rest(source, small_coco)
    diagnosis = examine([source], open_images=False, masks=False)
    assert faults(diagnosis) == []
    assert "images were not opened" in str(diagnosis)


def mended(source: DatasetSource, diagnosis: Diagnosis) -> tuple[dict[str, Any], list[str]]:
    fix = diagnosis.fix
    assert fix.num_changes == len(fix.changes)
    return fix.content, fix.changes + fix.removals


@pytest.mark.parametrize("name", FOUND)
def test_fix_does_what_the_doctor_says(write_dataset: Write, small_coco: dict, name: str) -> None:
    """It repairs and removes where the text says so, and nothing else; the fault is gone then."""
    kind, spoil, _ = FOUND[name]
    spoil(small_coco)
    source = write_dataset(small_coco)
    diagnosis, fault = examine([source]), FAULTS[kind]
    fix, found = diagnosis.fix, [FAULTS[finding.kind] for finding in diagnosis.findings]
    if fault.fix:
        assert f"-> {fault.remedy}; --fix {fault.fix}\n" in str(diagnosis)
        assert fix.changes or fix.removals
    if fault.repair and not fault.removal:
        assert fix.changes
    if fault.removal and not fault.repair:
        assert fix.removals
    if not any(other.repair for other in found):
        assert fix.changes == []
        assert fix.num_changes == 0
    if not any(other.removal for other in found):
        assert fix.removals == []
        assert [len(fix.content[k]) for k in fix.before] == [len(small_coco[k]) for k in fix.before]
    if not any(other.fix for other in found):
        assert fix.content == small_coco
        assert "--fix OUT.json" not in str(diagnosis).splitlines()[-1]
    counts = (("repairs", fix.num_changes), ("removes", len(fix.removals)))
    hint = " and ".join(f"{verb} {count}" for verb, count in counts if count)
    assert (f"; --fix OUT.json {hint} in a copy" if hint else " note") in str(diagnosis).splitlines()[-1]
    write_rest(source, fix.content)
    again = examine([source])
    assert kind not in {f.kind for f in again.findings} or not fault.fix
    assert again.fix.content == fix.content
    assert not again.fix.changes
    assert not again.fix.removals


@pytest.mark.parametrize("name", [n for n, (kind, _, _) in FOUND.items() if FAULTS[kind].fix])
def test_a_repaired_copy_is_read_and_has_no_fault(write_dataset: Write, small_coco: dict, name: str) -> None:
    FOUND[name][1](small_coco)
    source = write_dataset(small_coco)
    write_rest(source, examine([source]).fix.content)
    assert len(CocoDataset(source, evaluation=True)) >= 3
    assert faults(examine([source])) == []


def test_a_good_file_is_left_as_it_is(write_dataset: Write, small_coco: dict) -> None:
    source = write_dataset(small_coco)
    assert mended(source, examine([source])) == (small_coco, [])


def test_repairs_keep_what_is_right(write_dataset: Write, small_coco: dict) -> None:
    """A box comes from its mask, a size from its file, a clash of ids costs no object."""
    small_coco["annotations"][0]["bbox"] = [1, 2, -3, 4]
    small_coco["annotations"][1]["id"] = 1
    small_coco["images"][2]["height"] = 65  # image 5
    source = write_dataset(small_coco)
    content, _ = mended(source, examine([source]))
    assert content["annotations"][0]["bbox"] == [10, 10, 30, 20]
    assert [a["id"] for a in content["annotations"]] == [1, 6, 3, 4, 5]
    assert content["images"][2]["height"] == 64


def test_flags_and_sizes_of_other_exporters_cost_no_object(write_dataset: Write, small_coco: dict) -> None:
    small_coco["images"][0] |= {"height": 60.0, "width": 90.0}  # equal to the file's, and no integers
    small_coco["annotations"][0]["ignore"] = None
    small_coco["annotations"][1]["ignore"] = 1
    source = write_dataset(small_coco)
    content, changes = mended(source, examine([source]))
    assert len(content["images"]) == 4 and len(content["annotations"]) == 5, changes
    assert [entry["iscrowd"] for entry in content["annotations"][:2]] == [0, 1]


def test_boxes_stay_where_nobody_needs_their_masks(write_dataset: Write, small_coco: dict) -> None:
    small_coco["annotations"][0]["segmentation"] = [[]]
    small_coco["annotations"][2]["segmentation"] = {"size": [90, 60], "counts": "no RLE"}
    source = write_dataset(small_coco)
    done = examine([source], masks=False).fix
    kept = {entry["id"]: entry for entry in done.content["annotations"]}
    assert len(kept) == 5 and "segmentation" not in kept[3], done.removals
    assert kept[2]["segmentation"]
    assert len(done.removals) == 1


def resized(source: DatasetSource, image_id: int, height: int, width: int) -> None:
    """The image of another size, in place."""
    path = source.images / f"{image_id}.png"
    with Image.open(path) as old:
        old.resize((width, height)).save(path)


@pytest.mark.parametrize(
    ("image_id", "size", "factor"),
    [(7, (120, 180), "2.00"), (7, (91, 136), "1.51"), (2, (900, 600), "10.00"), (5, (32, 32), "0.50")],
)
def test_a_resized_picture_is_not_taken_for_a_wrong_size(
    write_dataset: Write, small_coco: dict, image_id: int, size: tuple[int, int], factor: str
) -> None:
    """All boxes fit into the larger file, at half the scale."""
    source = write_dataset(small_coco)
    resized(source, image_id, *size)
    content, changes = mended(source, examine([source]))
    reason = f"the file is the annotated picture resized by {factor}; scale its annotations or restore"
    assert f"image removed: image {image_id}: {reason} the file" in changes, changes
    assert image_id not in {image["id"] for image in content["images"]}
    assert image_id not in {annotation["image_id"] for annotation in content["annotations"]}


@pytest.mark.parametrize(
    ("image_id", "size"),
    [(7, (120, 190)), (7, (62, 90)), (7, (61, 91)), (11, (100, 160))],
    ids=["other shape", "one side", "a pixel", "nothing annotated"],
)
def test_a_wrong_size_is_still_mended(
    write_dataset: Write, small_coco: dict, image_id: int, size: tuple[int, int]
) -> None:
    source = write_dataset(small_coco)
    resized(source, image_id, *size)
    content, _ = mended(source, examine([source]))
    entry = next(image for image in content["images"] if image["id"] == image_id)
    assert (entry["height"], entry["width"]) == size
    assert content["annotations"] == small_coco["annotations"]


def test_annotations_that_were_made_on_the_larger_file_are_kept(
    write_dataset: Write, small_coco: dict
) -> None:
    """The JSON's size is half the file's, and boxes or RLE show that it is the one that is wrong."""
    for entry in small_coco["images"][:2]:
        entry |= {"height": entry["height"] // 2, "width": entry["width"] // 2}
    source = write_dataset(small_coco)
    content, changes = mended(source, examine([source]))
    assert [image["height"] for image in content["images"]] == [60, 90, 64, 50]
    assert len(changes) == 2
    assert len(content["annotations"]) == 5


@pytest.mark.parametrize("polygon", [[1, 1, 5, 5], [1, 1, 0, 5, 1, 0, 5, 5, 0]], ids=["two points", "odd"])
def test_objects_without_a_polygon_do_not_count(
    write_dataset: Write, small_coco: dict, polygon: list[int]
) -> None:
    """Training with masks leaves them out, and has nothing to learn from."""
    for entry in small_coco["annotations"]:
        entry["segmentation"] = [polygon]
    source = write_dataset(small_coco)
    assert len(CocoDataset(source).objects.labels) == 0
    diagnosis = examine([source])
    assert {"empty-list", "short-polygon"} <= diagnosis.kinds().keys()
    assert not diagnosis.parts[0].sizes
    assert diagnosis.parts[0].crowds == 1
    assert len(examine([source], masks=False).parts[0].sizes) == 4


def test_what_is_no_coco_file_is_refused(write_dataset: Write) -> None:
    for text in ("", "[]", '{"images": 1}', "1" * 5000):
        with pytest.raises(UserError, match="annotations.json"):
            examine([write_dataset(text)])


def test_the_report_for_machines(write_dataset: Write, small_coco: dict) -> None:
    small_coco["annotations"][0]["area"] = float("inf")
    report = json.loads(json.dumps(examine([write_dataset(small_coco)]).as_json()))
    assert report["parts"][0]["images"] == 4
    assert report["summary"]["bad-area"]["count"] == 1
    assert report["summary"]["bad-area"]["severity"] == ERROR
    assert [f["annotation_id"] for f in report["findings"] if f["kind"] == "bad-area"] == [1]


@pytest.mark.parametrize("name", ["coco80", "coco_person1", pytest.param("dsb2018", marks=pytest.mark.slow)])
def test_real_data_have_no_false_alarms(shared_dir: Path, name: str) -> None:
    folder = shared_dir / "data" / name
    parts = [
        DatasetSource(part, folder / "annotations" / f"instances_{part}.json", folder / "images")
        for part in ("train", "val")
    ]
    diagnosis = examine(parts)
    assert [f for f in diagnosis.findings if f.severity != NOTE] == []
    crossing: list[Finding] = [f for f in diagnosis.findings if f.kind == "crossing-polygon"]
    assert len(crossing) <= 3


def test_an_image_turned_by_exif_has_both_sizes(write_dataset: Write, small_coco: dict) -> None:
    """As reading accepts both."""
    source = write_dataset(small_coco)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((90, 60, 3), dtype=np.uint8)).save(source.images / "7.png", exif=exif)
    assert faults(examine([source])) == []  # stored 60 x 90 (width x height), upright 90 x 60
    small_coco["images"][1] |= {"file_name": "7.png"}
    diagnosis = examine([write_rest(source, small_coco)])
    assert {f.kind for f in diagnosis.findings if f.severity == ERROR} == set()
