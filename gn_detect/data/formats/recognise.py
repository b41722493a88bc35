"""Recognise annotations of other formats by their content, and name the way to bring them in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ...files import read_text

_HEAD = 1 << 16  # bytes that are read of a file
_MOST_FILES = 200  # that are looked at in a folder
_ENDINGS = (".yaml", ".yml", ".xml", ".json", ".txt", ".csv")

_IMPORT = "gn-detect import SRC DST.json converts it, and gn-detect train --data SRC trains on it"
_FORMATS = {  # name and remedy
    "yolo": ("YOLO labels", _IMPORT),
    "voc": ("Pascal VOC XML", _IMPORT),
    "cvat": ("CVAT's XML", _IMPORT),
    "labelme": ("labelme's JSON", _IMPORT),
    "via": ("a project of VIA (VGG Image Annotator)", _IMPORT),
    "via3": ("a project of VIA 3 (VGG Image Annotator)", 'export from VIA 3 as "COCO"'),
    "label-studio": ("Label Studio's JSON", _IMPORT),
    "label-studio-min": ("Label Studio's JSON-MIN", 'export from Label Studio as "JSON"'),
    "results": ("a file of results, as COCO's evaluation reads them", "give the annotations themselves"),
    "list": ("a list of annotations alone", "give the whole COCO file, with 'images' and 'categories'"),
    "captions": ("COCO's captions", "give the instances_*.json, which has boxes and masks"),
    "panoptic": ("COCO's panoptic annotations", "give the instances_*.json instead"),
    "createml": ("CreateML's JSON", "export as COCO from the tool that made it (Roboflow), or use FiftyOne"),
    "geojson": ("GeoJSON", "convert it into COCO in pixels of the images, e.g. with solaris or QuPath"),
    "supervisely": ("Supervisely's JSON", 'export from Supervisely with the app "Export to COCO"'),
    "labelbox": ("Labelbox's export", "convert it with Labelbox's COCO converter"),
    "darwin": ("V7 Darwin's JSON", "export from V7 as COCO (darwin dataset convert NAME coco)"),
    "datumaro": ("Datumaro's JSON", "let Datumaro convert it to coco_instances"),
    "detectron2": ("detectron2's list of dicts", "detectron2.data.datasets.convert_to_coco_json writes COCO"),
    "csv": ("a table (CSV)", "export as COCO from the tool that made it"),
    "archive": ("an archive", "unpack it, and give the JSON in it"),
    "image": ("an image", "give the annotation file"),
}


def describe_foreign(path: Path) -> str:
    """Return the format of a file or folder that is no COCO JSON, with a remedy; empty if unknown.

    Only names and the first kilobytes of some files are read.
    """
    try:
        if not path.is_dir():
            return _sentence(_kind_of_file(path))
        kind = next(iter(find_format(path)), "")
        if kind == "coco":
            files = map(str, coco_files(path)[:3])
            return f"it is a folder; give the COCO file in it, {' or '.join(files)}"
    except OSError:
        return ""
    return _sentence(kind, "a folder of ") or "it is a folder; give the COCO annotation file"


def find_format(path: Path) -> list[str]:
    """Return the formats that a file or the files of a folder have, ``coco`` among them, the likeliest first.

    A folder with COCO files is COCO's alone. A file of JSON is read whole where its first kilobytes do not
    tell.
    """
    try:
        if not path.is_dir():
            if not path.is_file():
                return []
            if _looks_like_coco(path):
                return ["coco"]
            kind = _kind_of_file(path)
            if not kind and path.suffix.lower() == ".json":
                kind = _kind_of_content(json.loads(read_text(path)))
            return [kind] if kind else []
        if coco_files(path):
            return ["coco"]
        kinds = {_kind_of_file(file) for file in islice(_files(path), _MOST_FILES)}
    except (OSError, ValueError, RecursionError):
        return []
    return [kind for kind in _FORMATS if kind in kinds]


def coco_files(folder: Path) -> list[Path]:
    """Return the COCO files among the first files of a folder and of those below it, sorted."""
    files = islice(_files(folder), _MOST_FILES)
    return sorted(file for file in files if file.suffix.lower() == ".json" and _looks_like_coco(file))


def describe_foreign_content(content: Any) -> str:
    """Return the format of JSON content that is not COCO's instances, with a remedy; empty if unknown."""
    return _sentence(_kind_of_content(content))


def _kind_of_content(content: Any) -> str:
    kinds, entries = _LIST_KINDS, content[:10] if isinstance(content, list) else []
    if isinstance(content, dict):
        kinds, entries = _DICT_KINDS, [content]
    found = [entry for entry in entries if isinstance(entry, dict)]
    return next((kind for kind, fits in kinds.items() if any(map(fits, found))), "")


def _sentence(kind: str, what: str = "") -> str:
    name, remedy = _FORMATS.get(kind, ("", ""))
    return f"it is {what}{name}; {remedy}" if kind else ""


def _has(entry: Any, *keys: str) -> bool:
    return isinstance(entry, dict) and all(key in entry for key in keys)


def _any_has(entries: Any, *keys: str) -> bool:
    return isinstance(entries, list) and any(_has(entry, *keys) for entry in entries[:10])


# Tests of one of the first entries of a list.
_LIST_KINDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "results": lambda e: _has(e, "image_id", "category_id", "score"),
    "list": lambda e: _has(e, "image_id", "category_id") and ("bbox" in e or "segmentation" in e),
    "label-studio": lambda e: (
        any(_any_has(e.get(key), "result") for key in ("annotations", "completions", "predictions"))
        or (isinstance(e.get("data"), dict) and "annotations" in e)
    ),
    "label-studio-min": lambda e: _has(e, "annotation_id", "lead_time") or _has(e, "annotator", "created_at"),
    "detectron2": lambda e: _has(e, "file_name", "annotations"),
    "createml": lambda e: _any_has(e.get("annotations"), "label", "coordinates"),
    "labelbox": lambda e: "data_row" in e or _has(e, "DataRow ID", "Label") or _has(e, "ID", "Labeled Data"),
    "via": lambda e: _has(e, "filename", "regions"),
    "labelme": lambda e: _has(e, "shapes", "imagePath"),
}

_DICT_KINDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "via3": lambda c: _has(c, "project", "metadata") and ("view" in c or "file" in c),
    "panoptic": lambda c: _any_has(c.get("annotations"), "segments_info"),
    "captions": lambda c: _any_has(c.get("annotations"), "caption"),
    "labelme": lambda c: isinstance(c.get("shapes"), list) and ("imagePath" in c or "imageData" in c),
    "geojson": lambda c: c.get("type") in ("FeatureCollection", "Feature"),
    "supervisely": lambda c: (
        _any_has(c.get("objects"), "classTitle")
        or (isinstance(c.get("objects"), list) and _has(c.get("size"), "height", "width"))
        or (_any_has(c.get("classes"), "title", "shape"))
    ),
    "darwin": lambda c: isinstance(c.get("item"), dict) and "annotations" in c,
    "datumaro": lambda c: isinstance(c.get("items"), list) and isinstance(c.get("categories"), dict),
    "label-studio": lambda c: _has(c, "data", "annotations") and isinstance(c["data"], dict),
    "labelbox": lambda c: "data_row" in c,
    "via": lambda c: (
        "_via_img_metadata" in c
        or (bool(c) and all(_has(entry, "filename", "regions") for entry in islice(c.values(), 10)))
    ),
}


def _kind_of_file(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        data = file.read(_HEAD)
    if data[:4] == b"PK\x03\x04" or data[:2] == b"\x1f\x8b" or data[257:262] == b"ustar":
        return "archive"
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")):
        return "image"
    text = data.decode("utf-8-sig", "replace").strip()
    if text.startswith("<"):
        # The first tag alone: nothing that the file defines is expanded.
        tag = re.search(r"<([A-Za-z_][\w.-]*)", text)
        return {"annotation": "voc", "annotations": "cvat"}.get(tag[1].lower() if tag else "", "")
    if text.startswith(("{", "[")):
        return next((kind for kind, pattern in _JSON_TEXT.items() if re.search(pattern, text)), "")
    if path.suffix.lower() in (".yaml", ".yml"):
        return "yolo" if re.search(r"^(names|nc)\s*:", text, re.MULTILINE) else ""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and all(_YOLO_LINE.fullmatch(line.strip()) for line in lines[:20][: max(1, len(lines) - 1)]):
        return "yolo"
    if path.suffix.lower() == ".csv" or re.match(r"#?\"?\w+\"?(,\"?\w+\"?){3,}$", lines[0] if lines else ""):
        return "csv"
    return ""


_YOLO_LINE = re.compile(r"\d+(\s+-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?){4,}", re.IGNORECASE)


# Tests of JSON whose end was not read, or that is damaged or a JSON for each line.
_JSON_TEXT = {
    "labelme": r'"shapes"\s*:\s*\[',
    "via": r'"_via_img_metadata"\s*:|"regions"\s*:',
    "labelbox": r'"data_row"\s*:',
    "supervisely": r'"classTitle"\s*:',
    "darwin": r'"item"\s*:\s*\{',
    "geojson": r'"FeatureCollection"',
    "createml": r'"coordinates"\s*:\s*\{',
    "label-studio": r'"result"\s*:\s*\[',
}


def _files(folder: Path) -> Iterator[Path]:
    """Yield some text files of a folder and of the folders in it, which may hold many images."""
    folders = [folder]
    for _ in range(3):
        below: list[Path] = []
        for place in folders[:20]:
            with os.scandir(place) as entries:
                for entry in islice(entries, 20 * _MOST_FILES):
                    if entry.is_dir():
                        below.append(Path(entry.path))
                    elif entry.is_file() and entry.name.lower().endswith(_ENDINGS):
                        yield Path(entry.path)
        folders = sorted(below)


def _looks_like_coco(file: Path) -> bool:
    with open(file, "rb") as opened:
        head = opened.read(_HEAD)
    is_coco = re.search(rb'"(images|categories)"\s*:\s*\[|"category_id"', head)
    return is_coco is not None and not any(mark in head for mark in (b'"segments_info"', b'"score"'))
