"""Read VIA 2's JSON, a project or exported annotations: rectangles, circles, ellipses and polygons.

The class is the only attribute that regions have. With several it is the one named class, label, category,
name or type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..coco.rules import shown
from .builder import Builder, Imported, Shape
from .image_index import ImageIndex
from .shapes import ellipse_polygon
from .source_files import damaged, finite_numbers, label_files, read_json

_CLASS_NAMES = ("class", "label", "category", "name", "type")
_LEFT_OUT = ("point", "polyline")
_KEYS = {
    "rect": ("x", "y", "width", "height"),
    "circle": ("cx", "cy", "r"),
    "ellipse": ("cx", "cy", "rx", "ry"),
}


def read(path: Path, index: ImageIndex) -> Imported:
    """Read a file, or all files of a folder and of those below it."""
    files = [path] if path.is_file() else label_files(path, "*.json")
    contents = {file: _entries(content) for file in files if _is_via(content := read_json(file))}
    if not contents:
        raise damaged(path, "it has no images of VIA 2", "export annotations as JSON")
    regions = [(file, region) for file, entries in contents.items() for region in _regions(file, entries)]
    attribute = _class_attribute(path, regions)
    builder = Builder("VIA", index)
    if not attribute:
        builder.note("regions have no attribute: all are of the class 'object'", str(path))
    for file, entries in contents.items():
        for key, entry in entries.items():
            _read_image(file, key, entry, attribute, builder)
    return builder.finish()


def _is_via(content: Any) -> bool:
    entries = _entries(content)
    return bool(entries) and all(isinstance(e, dict) and "filename" in e for e in entries.values())


def _entries(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        return {}
    found = content.get("_via_img_metadata", content)
    return found if isinstance(found, dict) else {}


def _regions(file: Path, entries: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what names a region in messages, and the region; VIA 1 has an object of numbered regions."""
    for key, entry in entries.items():
        yield from _regions_of(file, key, entry)


def _regions_of(file: Path, key: str, entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    given = entry.get("regions", [])
    found = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(found, list):
        raise damaged(file, f"image {key[:80]!r} has 'regions' {shown(given)}", "export it again")
    for number, region in enumerate(found):
        what = f"image {key[:80]!r}, region {number} (counted from 0)"
        parts = (
            [region.get(part) for part in ("shape_attributes", "region_attributes")]
            if isinstance(region, dict)
            else []
        )
        if not parts or not isinstance(parts[0], dict) or not isinstance(parts[1] or {}, dict):
            raise damaged(file, f"{what} is {shown(region)}", "export it again")
        yield what, region


def _class_attribute(path: Path, regions: list[tuple[Path, tuple[str, dict[str, Any]]]]) -> str:
    """Return the attribute that holds the class; empty if regions have none."""
    counts = Counter(name for _, (_, region) in regions for name in region.get("region_attributes") or {})
    named = [name for wanted in _CLASS_NAMES for name in counts if name.strip().lower() == wanted]
    if len(counts) > 1 and not named:
        known = ", ".join(sorted(counts)[:10])
        raise damaged(
            path, f"regions have the attributes {known}", "name the one of the class 'class' in VIA"
        )
    return (named or list(counts) or [""])[0]


def _read_image(file: Path, key: str, entry: dict[str, Any], attribute: str, builder: Builder) -> None:
    name, what = entry.get("filename"), f"image {key[:80]!r}"
    if not isinstance(name, str):
        raise damaged(file, f"{what} has 'filename' {shown(name)}", "give the name of the image")
    image = builder.add_image(builder.find_image(name, file, what), file, what)
    shapes = []
    for about, region in _regions_of(file, key, entry):
        if region["shape_attributes"].get("name") in _LEFT_OUT:
            builder.note("points and lines are left out", f"{file}: {about}")
            continue
        label = _label(file, region, attribute, about) if attribute else "object"
        shapes.append(_shape(file, region["shape_attributes"], label, about))
    builder.add(image, shapes)


def _label(file: Path, region: dict[str, Any], attribute: str, what: str) -> str:
    value = (region.get("region_attributes") or {}).get(attribute)
    if isinstance(value, dict):  # a checkbox
        chosen = [name for name, is_set in value.items() if is_set]
        value = chosen[0] if len(chosen) == 1 else None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise damaged(file, f"{what} has no single value of {attribute!r}", "give it one class")
    return str(value).strip()


def _shape(file: Path, given: dict[str, Any], label: str, what: str) -> Shape:
    kind = given.get("name")
    if kind == "polygon":
        xs, ys = given.get("all_points_x"), given.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise damaged(file, f"{what} has not as many x as y", "draw it again")
        return Shape(
            label,
            what,
            polygons=[[n for x, y in zip(xs, ys, strict=True) for n in finite_numbers(file, (x, y), what)]],
        )
    if kind not in _KEYS:
        raise damaged(
            file, f"{what} has the shape {shown(kind)}", "draw a rectangle, circle, ellipse or polygon"
        )
    numbers = finite_numbers(file, (given.get(key) for key in _KEYS[kind]), what)
    if kind == "rect":
        x, y, width, height = numbers
        return Shape(label, what, box=(x, y, x + width, y + height))
    if kind == "circle":
        x, y, radius = numbers
        return Shape(label, what, polygons=[ellipse_polygon(x, y, radius, radius)])
    (angle,) = finite_numbers(file, (given.get("theta", 0),), what)  # in radians
    x, y, rx, ry = numbers
    return Shape(label, what, polygons=[ellipse_polygon(x, y, rx, ry, angle)])
