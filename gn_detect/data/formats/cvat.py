"""Read CVAT's XML for images 1.1: boxes, polygons, ellipses and masks.

A mask has run lengths along the rows of its box, of background and object in turn. Shapes of one group and
label are one object. ``subset`` names the part of an image. ``z_order`` and ``occluded`` change nothing.
"""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from ...errors import UserError
from ..coco.rules import MOST_PIXELS
from .builder import PART_WORDS, WHOLE, Builder, Imported, Shape
from .image_index import ImageIndex
from .shapes import ellipse_polygon, runs_to_bitmap
from .source_files import as_finite, damaged, finite_numbers, label_files, read_xml

_LEFT_OUT = ("points", "polyline", "cuboid", "skeleton", "tag")


def read(path: Path, index: ImageIndex) -> Imported:
    """Read a file, or all files of a folder and of those below it."""
    files = [path] if path.is_file() else label_files(path, "*.xml")
    roots = {file: root for file in files if (root := read_xml(file)).tag == "annotations"}
    if not roots:
        raise damaged(path, "it has no <annotations>", 'export it as "CVAT for images 1.1"')
    names = [_names(root) for root in roots.values()]
    classes = list(dict.fromkeys(name for found in names for name in found)) if all(names) else None
    builder = Builder("CVAT", index, classes)
    for file, root in roots.items():
        if root.find("track") is not None:
            raise damaged(file, "it has <track>, of a video", 'export it as "CVAT for images 1.1"')
        for number, element in enumerate(root.iter("image"), 1):
            _read_image(file, element, f"<image> {number}", builder)
    return builder.finish()


def _names(root: Element) -> list[str]:
    """Return the classes in the order of ``<labels>``; those of a skeleton's points have a parent."""
    labels = [label for label in root.iterfind("meta//labels/label") if not label.findtext("parent")]
    return [(label.findtext("name") or "").strip() for label in labels]


def _read_image(file: Path, element: Element, what: str, builder: Builder) -> None:
    name = element.get("name", "")
    sides = [as_finite(element.get(key, "")) for key in ("width", "height")]
    if any(side is None or side <= 0 or side != int(side) for side in sides):
        raise damaged(file, f"{what} ({name}) has no width and height", "export it again")
    part = element.get("subset", "").lower()
    size = (int(sides[0] or 0), int(sides[1] or 0))
    image = builder.add_image(name, file, what, PART_WORDS.get(part, WHOLE), size)
    shapes = []
    for number, shape in enumerate(element, 1):
        about = f"{what} ({name}), <{shape.tag}> {number}"
        if shape.tag in _LEFT_OUT:
            builder.note("points, lines, cuboids, skeletons and tags are left out", f"{file}: {about}")
            continue
        shapes.append(_shape(file, shape, about))
    builder.add(image, shapes)


def _shape(file: Path, shape: Element, what: str) -> Shape:
    label, group = shape.get("label", "").strip(), shape.get("group_id")
    group = None if group in ("", "0") else group
    if shape.tag == "polygon":
        points = [point.split(",") for point in shape.get("points", "").split(";")]
        if any(len(point) != 2 for point in points):
            raise damaged(file, f"{what} has 'points' that are no pairs", "export it again")
        return Shape(label, what, polygons=[finite_numbers(file, chain(*points), what)], group=group)
    if shape.tag == "box":
        keys = ("xtl", "ytl", "xbr", "ybr")
        x0, y0, x1, y1 = finite_numbers(file, [shape.get(key, "") for key in keys], what)
        if as_finite(shape.get("rotation", "0")) != 0:
            raise UserError(
                "rotated-box",
                f"{file}: {what} is turned by {shape.get('rotation', '')[:20]} degrees; draw it as a polygon",
            )
        return Shape(label, what, box=(x0, y0, x1, y1), group=group)
    if shape.tag == "ellipse":
        given = [shape.get(key, "") for key in ("cx", "cy", "rx", "ry")] + [shape.get("rotation", "0")]
        cx, cy, rx, ry, degrees = finite_numbers(file, given, what)
        return Shape(
            label, what, polygons=[ellipse_polygon(cx, cy, rx, ry, math.radians(degrees))], group=group
        )
    if shape.tag == "mask":
        return Shape(label, what, bitmap=_bitmap(file, shape, what), group=group)
    raise damaged(file, f"{what} is no shape of CVAT's images 1.1", "export it again")


def _bitmap(file: Path, shape: Element, what: str) -> tuple[np.ndarray, int, int]:
    given = [shape.get(key, "") for key in ("left", "top", "width", "height")]
    left, top, width, height = map(int, finite_numbers(file, given, what))
    runs = shape.get("rle", "").split(",")
    try:
        if width * height > MOST_PIXELS or min(left, top) < -MOST_PIXELS or max(left, top) > MOST_PIXELS:
            raise ValueError("more pixels than an image may have")
        return runs_to_bitmap([int(run) for run in runs], height, width), left, top
    except (ValueError, OverflowError) as error:
        reason = str(error) if "invalid literal" not in str(error) else "'rle' that is no list of numbers"
        raise UserError("bad-rle", f"{file}: {what} has {reason}; export it again") from error
