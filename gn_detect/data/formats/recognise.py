"""Recognise annotations of other formats by their content, and say how to bring them in as COCO."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

_HEAD = 1 << 16
"""Bytes that are read of a file."""

_MOST_FILES = 200
"""Files of a folder that are looked at."""

_CONVERTERS = "convert it to COCO with FiftyOne or Datumaro"
_FORMATS = {
    "yolo": (
        "YOLO labels",
        f"{_CONVERTERS}, or export as COCO from the tool that made them (Roboflow, CVAT)",
    ),
    "voc": (
        "Pascal VOC XML",
        f"{_CONVERTERS}, or export as COCO from the tool (Roboflow, CVAT)",
    ),
    "cvat": ("CVAT's XML", 'export from CVAT as "COCO 1.0"'),
    "labelme": (
        "labelme's JSON",
        "pip install labelme2coco; labelme2coco FOLDER writes a COCO file",
    ),
    "via": ("a project of VIA (VGG Image Annotator)", 'in VIA choose "Export Annotations (COCO format)"'),
    "via3": ("a project of VIA 3 (VGG Image Annotator)", 'export from VIA 3 as "COCO"'),
    "label-studio": ("Label Studio's JSON", 'export from Label Studio as "COCO"'),
    "label-studio-min": ("Label Studio's JSON-MIN", 'export from Label Studio as "COCO"'),
    "results": ("a file of results, as COCO's evaluation reads them", "give the annotations themselves"),
    "list": ("a list of annotations alone", "give the whole COCO file, with 'images' and 'categories'"),
    "captions": ("COCO's captions", "give the instances_*.json, which has boxes and masks"),
    "panoptic": (
        "COCO's panoptic annotations",
        "give the instances_*.json instead",
    ),
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
"""Name and remedy of each format."""


def describe_foreign(path: Path) -> str:
    """Say what a file or folder is that is no COCO JSON, and how to bring it in; empty if that is unknown.

    Only names and the first kilobytes of some files are read.
    """
    try:
        if not path.is_dir():
            kind = _kind_of_file(path)
            return _sentence(kind) if kind else ""
        files = list(islice(_files(path), _MOST_FILES))
        coco = [str(file) for file in files if file.suffix.lower() == ".json" and _looks_like_coco(file)]
        if coco:
            return f"it is a folder; give the COCO file in it, {' or '.join(coco[:3])}"
        kinds = [kind for file in files if (kind := _kind_of_file(file))]
    except OSError:
        return ""
    kind = next((kind for kind in _FORMATS if kind in kinds), "")
    if not kind:
        return "it is a folder; give the COCO annotation file"
    name, remedy = _FORMATS[kind]
    return f"it is a folder of {name}; {remedy}"


def describe_foreign_content(content: Any) -> str:
    """Say the same of the content of a JSON file; empty for COCO's instances and for what is unknown."""
    kind = _kind_of_json(content)
    return _sentence(kind) if kind else ""


def _sentence(kind: str) -> str:
    name, remedy = _FORMATS[kind]
    return f"it is {name}; {remedy}"


def _kind_of_json(content: Any) -> str:
    if isinstance(content, list):
        return _first_kind(_LIST_KINDS, islice(content, 10))
    if not isinstance(content, dict):
        return ""
    kind = next((kind for kind, fits in _DICT_KINDS.items() if fits(content)), "")
    if kind:
        return kind
    some = list(islice(content.values(), 10))
    return "via" if some and all(_has(entry, "filename", "regions") for entry in some) else ""


def _first_kind(kinds: dict[str, Callable[[dict[str, Any]], bool]], entries: Iterator[Any]) -> str:
    found = [entry for entry in entries if isinstance(entry, dict)]
    return next((kind for kind, fits in kinds.items() if any(map(fits, found))), "")


def _has(entry: Any, *keys: str) -> bool:
    return isinstance(entry, dict) and all(key in entry for key in keys)


def _any_has(entries: Any, *keys: str) -> bool:
    return isinstance(entries, list) and any(_has(entry, *keys) for entry in entries[:10])


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
"""Of one entry of a list."""

_DICT_KINDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "via": lambda c: "_via_img_metadata" in c,
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
        return _kind_of_xml(text)
    if text.startswith(("{", "[")):
        return _kind_of_json_text(text)
    if path.suffix.lower() in (".yaml", ".yml"):
        return "yolo" if re.search(r"^(names|nc)\s*:", text, re.MULTILINE) else ""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and all(_YOLO_LINE.fullmatch(line.strip()) for line in lines[:20][: max(1, len(lines) - 1)]):
        return "yolo"
    if path.suffix.lower() == ".csv" or re.match(r"#?\"?\w+\"?(,\"?\w+\"?){3,}$", lines[0] if lines else ""):
        return "csv"
    return ""


_YOLO_LINE = re.compile(r"\d+(\s+-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?){4,}", re.IGNORECASE)


def _kind_of_xml(text: str) -> str:
    """Tell the kind by the first tag alone: nothing that the file defines is expanded."""
    tag = re.search(r"<([A-Za-z_][\w.-]*)", text)
    return {"annotation": "voc", "annotations": "cvat"}.get(tag[1].lower() if tag else "", "")


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
"""Of JSON whose end was not read, or that is damaged or a JSON for each line."""


def _kind_of_json_text(text: str) -> str:
    return next((kind for kind, pattern in _JSON_TEXT.items() if re.search(pattern, text)), "")


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
                    elif entry.is_file() and entry.name.lower().endswith(
                        (".yaml", ".yml", ".xml", ".json", ".txt", ".csv")
                    ):
                        yield Path(entry.path)
        folders = sorted(below)


def _looks_like_coco(file: Path) -> bool:
    with open(file, "rb") as opened:
        head = opened.read(_HEAD)
    lists = re.search(rb'"(images|categories)"\s*:\s*\[', head)
    return (
        bool(lists or b'"category_id"' in head) and b'"segments_info"' not in head and b'"score"' not in head
    )
