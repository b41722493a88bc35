"""Read labelme's JSON, one file for each image: polygons, rectangles, circles and masks.

``group_id`` joins shapes of one label into one object. The points of a mask are the first and the last pixel
of its box, and its bitmap is a PNG in base64.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..coco.rules import MOST_PIXELS, shown
from .builder import Builder, Imported, Shape
from .image_index import ImageIndex
from .shapes import ellipse_polygon
from .source_files import as_finite, damaged, label_files, read_json

_LEFT_OUT = ("point", "points", "line", "linestrip")


def read(path: Path, index: ImageIndex) -> Imported:
    """Read a file, or all files of a folder and of those below it."""
    files = [path] if path.is_file() else label_files(path, "*.json")
    builder = Builder("labelme", index)
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or "shapes" not in content:
            if path.is_file():
                raise damaged(file, "it has no 'shapes'", "save it again in labelme")
            builder.note("other JSON files are left out", str(file))
            continue
        _read_file(file, content, builder)
    return builder.finish()


def _read_file(file: Path, content: dict[str, Any], builder: Builder) -> None:
    name, given = content.get("imagePath"), content["shapes"]
    if not isinstance(name, str):
        raise damaged(file, f"'imagePath' is {shown(name)}", "give the name of the image")
    if not isinstance(given, list):
        raise damaged(file, f"'shapes' is {shown(given)}", "give a list")
    sides = [content.get(key) for key in ("imageWidth", "imageHeight")]
    known = None
    if sides != [None, None]:
        numbers = [as_finite(side) for side in sides]
        if any(number is None or number != int(number) or number <= 0 for number in numbers):
            raise damaged(file, f"'imageWidth' and 'imageHeight' are {shown(sides)}", "give the image's size")
        known = (int(numbers[0] or 0), int(numbers[1] or 0))
    image = builder.add_image(name.replace("\\", "/"), file, "'imagePath'", size=known)
    found = [_shape(file, entry, f"shape {n} (counted from 0)", builder) for n, entry in enumerate(given)]
    builder.add(image, [shape for shape in found if shape is not None])


def _shape(file: Path, entry: Any, what: str, builder: Builder) -> Shape | None:
    if not isinstance(entry, dict):
        raise damaged(file, f"{what} is {shown(entry)}", "give an object")
    kind, label, group = entry.get("shape_type") or "polygon", entry.get("label"), entry.get("group_id")
    if not isinstance(label, str):
        raise damaged(file, f"{what} has the label {shown(label)}", "name its class")
    if group is not None and not isinstance(group, int | str):
        raise damaged(file, f"{what} has 'group_id' {shown(group)}", "give a number, or null")
    if kind in _LEFT_OUT:
        builder.note("points and lines are left out", f"{file}: {what}")
        return None
    points = _points(file, entry.get("points"), what)
    label = label.strip()
    if kind == "polygon":
        return Shape(label, what, polygons=[[number for point in points for number in point]], group=group)
    if kind not in ("rectangle", "circle", "mask"):
        raise damaged(
            file, f"{what} has the shape {shown(kind)}", "draw a polygon, rectangle, circle or mask"
        )
    if kind == "rectangle" and len(points) == 4:  # of newer versions
        xs, ys = zip(*points, strict=True)
        if len(set(xs)) > 2 or len(set(ys)) > 2:
            return Shape(label, what, polygons=[[n for point in points for n in point]], group=group)
        points = [(min(xs), min(ys)), (max(xs), max(ys))]
    if len(points) != 2:
        raise damaged(file, f"{what} is a {kind} of {len(points)} points", "draw it again, with 2")
    (x0, y0), (x1, y1) = points
    if kind == "circle":
        radius = math.hypot(x1 - x0, y1 - y0)
        return Shape(label, what, polygons=[ellipse_polygon(x0, y0, radius, radius)], group=group)
    x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    if kind == "rectangle":
        return Shape(label, what, box=(x0, y0, x1, y1), group=group)
    bitmap = _bitmap(file, entry.get("mask"), what)
    if bitmap.shape != (int(y1) - int(y0) + 1, int(x1) - int(x0) + 1):
        reason = f"{what} has a mask of {bitmap.shape[1]}x{bitmap.shape[0]} pixels in a box of other size"
        raise damaged(file, reason, "draw it again")
    return Shape(label, what, bitmap=(bitmap, int(x0), int(y0)), group=group)


def _points(file: Path, given: Any, what: str) -> list[tuple[float, float]]:
    points = []
    for point in given if isinstance(given, list) else [None]:
        numbers = [as_finite(number) for number in point] if isinstance(point, list) else []
        if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
            raise damaged(file, f"{what} has 'points' with {shown(point)}", "give pairs of finite numbers")
        points.append((numbers[0], numbers[1]))
    return points


def _bitmap(file: Path, given: Any, what: str) -> np.ndarray:
    try:
        data = base64.b64decode(given, validate=True) if isinstance(given, str) else b""
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError("too large")
            return np.asarray(image.convert("L")) > 0
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise damaged(file, f"{what} has a 'mask' that is no PNG in base64", "draw it again") from error
