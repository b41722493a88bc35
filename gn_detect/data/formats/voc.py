"""Read Pascal VOC's XML: boxes, one file for each image, and ``ImageSets/Main`` for the parts.

VOC counts pixels from 1 and includes the last one: ``xmin`` 1 and ``xmax`` 10 are the first ten columns, from
0 to 10 in COCO's coordinates. Detectron2 and hotcoco read it the same way.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element

from ...errors import UserError
from .builder import PARTS, WHOLE, Builder, Imported, Shape
from .image_index import ImageIndex
from .source_files import as_finite, child_text, damaged, label_files, numbered_lines, read_labels, read_xml

_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read(path: Path, index: ImageIndex) -> Imported:
    """Read a file, or all files of a folder and of those below it."""
    files = [path] if path.is_file() else label_files(path, "*.xml")
    builder = Builder("Pascal VOC", index)
    part_of = _parts(path) if path.is_dir() else {}
    for file in files:
        root = read_xml(file)
        if root.tag != "annotation":
            builder.note("other XML files are left out", str(file))
            continue
        if part_of and file.stem not in part_of:
            builder.note("files that no list of ImageSets/Main names are left out", str(file))
            continue
        _read_file(file, root, part_of.get(file.stem, WHOLE), builder)
    return builder.finish()


def _parts(folder: Path) -> dict[str, str]:
    """Return the part of each stem by ``ImageSets/Main/{train,val,test}.txt``; nothing without them."""
    found: dict[str, str] = {}
    for part in PARTS:
        for file in sorted(folder.glob(f"**/ImageSets/Main/{part}.txt")):
            for number, line in numbered_lines(read_labels(file)):
                stem = line.split()[0]
                if found.setdefault(stem, part) != part:
                    raise damaged(file, f"line {number}: {stem} is in {found[stem]}, too", "keep one")
    return found


def _read_file(file: Path, root: Element, part: str, builder: Builder) -> None:
    name = child_text(root, "filename") or file.stem
    size = root.find("size")
    sides = [as_finite(child_text(size, key)) if size is not None else None for key in ("width", "height")]
    known = None
    if sides[0] and sides[1]:  # some tools write 0
        known = (int(sides[0]), int(sides[1]))
    image = builder.add_image(name, file, "<filename>", part, known)
    objects = enumerate(root.iter("object"), 1)
    builder.add(image, [_object(file, element, f"<object> {n}", builder) for n, element in objects])


def _object(file: Path, element: Element, what: str, builder: Builder) -> Shape:
    rotated = element.find("robndbox")
    if rotated is not None and as_finite(child_text(rotated, "angle")) != 0:
        raise UserError(
            "rotated-box",
            f"{file}: {what} is a rotated box; draw it upright, or as a polygon in another format",
        )
    box = element.find("bndbox")
    if box is None:
        raise damaged(file, f"{what} has no <bndbox>", "complete it")
    numbers = [as_finite(child_text(box, side)) for side in _SIDES]
    for side, value in zip(_SIDES, numbers, strict=True):
        if value is None:
            raise damaged(
                file, f"{what} has <{side}> {child_text(box, side)[:40]!r}", "give a number of pixels"
            )
    x0, y0, x1, y1 = (value for value in numbers if value is not None)
    if x1 < x0 or y1 < y0:
        raise damaged(file, f"{what} ends before it begins: {[x0, y0, x1, y1]}", "correct <bndbox>")
    if child_text(element, "difficult") == "1":
        builder.note("'difficult' objects are ordinary objects", f"{file}: {what}")
    if element.find("part") is not None:
        builder.note("parts of objects are left out", f"{file}: {what}")
    if min(x0, y0) < 1:
        text = "boxes begin at 0, and VOC counts from 1: if the tool counts from 0, boxes are 1 pixel too far"
        builder.note(f"{text} to the left and the top", f"{file}: {what}")
    return Shape(child_text(element, "name"), what, box=(max(x0 - 1, 0), max(y0 - 1, 0), x1, y1))
