"""Read VIA 2's JSON, a project or exported annotations: rectangles, circles, ellipses and polygons.

The class is the only attribute that regions have. With several it is the one named class, label, category,
name or type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
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
    contents = {file: entries for file in files if (entries := _entries(read_json(file)))}
    if not contents:
        raise damaged(path, "it has no images of VIA 2", "export annotations as JSON")
    images = [(file, key, entry) for file, entries in contents.items() for key, entry in entries.items()]
    attribute = _class_attribute(path, [region for image in images for _, region in _regions(*image)])
    builder = Builder("VIA", index)
    if not attribute:
        builder.note("regions have no attribute: all are of the class 'object'", str(path))
    for image in images:
        _read_image(*image, attribute, builder)
    return builder.finish()


def _entries(content: Any) -> dict[str, Any]:
    """Return the images' entries; nothing for a file of another format."""
    found: Any = content.get("_via_img_metadata", content) if isinstance(content, dict) else None
    entries = list(found.values()) if isinstance(found, dict) else [None]
    return found if all(isinstance(entry, dict) and "filename" in entry for entry in entries) else {}


def _regions(file: Path, key: str, entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what names a region in messages, and the region; VIA 1 has an object of numbered regions."""
    given = entry.get("regions", [])
    found = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(found, list):
        raise damaged(file, f"image {key[:80]!r} has 'regions' {shown(given)}", "export it again")
    for number, region in enumerate(found):
        what = f"image {key[:80]!r}, region {number} (counted from 0)"
        parts = region if isinstance(region, dict) else {}
        shape, attributes = parts.get("shape_attributes"), parts.get("region_attributes") or {}
        if not isinstance(shape, dict) or not isinstance(attributes, dict):
            raise damaged(file, f"{what} is {shown(region)}", "export it again")
        yield what, region


def _class_attribute(path: Path, regions: list[dict[str, Any]]) -> str:
    """Return the attribute that holds the class; empty if regions have none."""
    counts = Counter(name for region in regions for name in region.get("region_attributes") or {})
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
    image = builder.add_image(name, file, what)
    shapes = []
    for about, region in _regions(file, key, entry):
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
        points = chain.from_iterable(zip(xs, ys, strict=True))
        return Shape(label, what, polygons=[finite_numbers(file, points, what)])
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
