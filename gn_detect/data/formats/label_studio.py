"""Read Label Studio's JSON: rectangles, ellipses, polygons and brushes, in percent of the image.

A task has one annotation. Predictions are not annotations, and a task without an annotation is no image
without objects: both are left out and counted. A brush is the alpha of an RGBA picture in the run-length
coding of thi.ng/rle-pack.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..coco.rules import MOST_PIXELS, shown
from ..images import IMAGE_SUFFIXES
from .builder import Builder, Imported, Shape
from .image_index import ImageIndex
from .shapes import ellipse_polygon
from .source_files import as_finite, damaged, label_files, read_json

_KINDS = {"rectanglelabels", "ellipselabels", "polygonlabels", "brushlabels"}
# The shapes of <Rectangle>, ... with a separate <Labels>, which stands in an entry of the same id.
_PLAIN = {"rectangle", "ellipse", "polygon", "brush"}


def read(path: Path, index: ImageIndex) -> Imported:
    """Read a file, or all files of a folder and of those below it."""
    files = [path] if path.is_file() else label_files(path, "*.json")
    builder = Builder("Label Studio", index)
    for file in files:
        content = read_json(file)
        tasks = content if isinstance(content, list) else [content]
        for number, task in enumerate(tasks):
            if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
                if path.is_dir() and not isinstance(content, list):
                    builder.note("other JSON files are left out", str(file))
                    break
                raise damaged(file, f"task {number} (counted from 0) has no 'data'", "export it as JSON")
            _read_task(file, task, f"task {shown(task.get('id', number))}", builder)
    return builder.finish()


def _read_task(file: Path, task: dict[str, Any], what: str, builder: Builder) -> None:
    given = task.get("annotations", task.get("completions"))
    if not isinstance(given, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("result"), list) for entry in given
    ):
        raise damaged(file, f"{what} has no list of annotations with a 'result'", "export it as JSON")
    if task.get("predictions"):
        builder.note("predictions are left out", f"{file}: {what}")
    done = [entry for entry in given if not entry.get("was_cancelled")]
    truth = [entry for entry in done if entry.get("ground_truth")]
    chosen = truth if len(truth) == 1 else done
    if not chosen:
        builder.note("tasks without an annotation are left out", f"{file}: {what}")
        return
    if len(chosen) > 1:
        raise damaged(
            file, f"{what} has {len(chosen)} annotations", "mark one as ground truth, or delete the others"
        )
    name = _image_name(file, task["data"], what)
    stated = _stated_size(file, chosen[0]["result"], what)
    image = builder.add_image(name, file, what, size=stated)
    size = (image.record.width, image.record.height)
    labels = _labels(chosen[0]["result"])
    shapes = []
    for number, entry in enumerate(chosen[0]["result"]):
        about = f"{what}, result {number} (counted from 0)"
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind in _KINDS or kind in _PLAIN:
            shapes.append(_shape(file, entry, labels, size, about))
        elif kind != "labels":
            builder.note(
                "results that are no rectangle, ellipse, polygon or brush are left out", f"{file}: {about}"
            )
    builder.add(image, shapes)


def _image_name(file: Path, data: dict[str, Any], what: str) -> str:
    """Return the task's image: ``image``, or the only text with the ending of an image."""
    if isinstance(data.get("image"), str):
        return str(data["image"])
    endings = tuple(IMAGE_SUFFIXES)
    found = [v for v in data.values() if isinstance(v, str) and v.partition("?")[0].lower().endswith(endings)]
    if len(found) != 1:
        raise damaged(file, f"{what} has {len(found)} images in 'data'", "name the one 'image'")
    return found[0]


def _stated_size(file: Path, results: list[Any], what: str) -> tuple[int, int] | None:
    """Return (width, height) of the image that was labelled, which the results repeat; None without any."""
    given = [entry for entry in results if isinstance(entry, dict)]
    pairs = {(str(e.get("original_width")), str(e.get("original_height"))) for e in given} - {
        ("None", "None")
    }
    sizes = [(as_finite(width), as_finite(height)) for width, height in sorted(pairs)]
    if len(sizes) > 1 or any(side is None or side <= 0 for size in sizes for side in size):
        raise damaged(file, f"{what} has the sizes {shown(sizes)}", "export it again")
    return (int(sizes[0][0] or 0), int(sizes[0][1] or 0)) if sizes else None


def _labels(results: list[Any]) -> dict[str, list[Any]]:
    """Return the classes of entries of the type ``labels`` by the id that they share with a shape."""
    found: dict[str, list[Any]] = {}
    for entry in results:
        value = entry.get("value") if isinstance(entry, dict) and entry.get("type") == "labels" else None
        if isinstance(value, dict) and isinstance(value.get("labels"), list):
            found[str(entry.get("id"))] = value["labels"]
    return found


def _shape(
    file: Path, entry: dict[str, Any], labels: dict[str, list[Any]], size: tuple[int, int], what: str
) -> Shape:
    kind, value = str(entry["type"]), entry.get("value")
    if not isinstance(value, dict):
        raise damaged(file, f"{what} has 'value' {shown(value)}", "export it again")
    names = value.get(kind, labels.get(str(entry.get("id")), value.get("labels")))
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise damaged(file, f"{what} has the classes {shown(names)}", "give it one")
    label, kind = names[0].strip(), kind.removesuffix("labels")
    if kind == "brush":
        return Shape(label, what, bitmap=(_brush(file, value.get("rle"), size, what), 0, 0))
    width, height = size
    if kind == "polygon":
        points = value.get("points")
        if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
            raise damaged(file, f"{what} has 'points' that are no pairs", "export it again")
        flat = _numbers(file, [number for point in points for number in point], what)
        return Shape(label, what, polygons=[[round(n * size[i % 2] / 100, 6) for i, n in enumerate(flat)]])
    (rotation,) = _numbers(file, [value.get("rotation") or 0], what)
    if kind == "ellipse":
        keys = ("x", "y", "radiusX", "radiusY")
        x, y, rx, ry = _numbers(file, [value.get(key) for key in keys], what)
        sides = (x * width / 100, y * height / 100, rx * width / 100, ry * height / 100)
        return Shape(label, what, polygons=[ellipse_polygon(*sides, math.radians(rotation))])
    if rotation:
        raise UserError(
            "rotated-box", f"{file}: {what} is rotated by {rotation:g} degrees; draw it as a polygon"
        )
    x, y, w, h = _numbers(file, [value.get(key) for key in ("x", "y", "width", "height")], what)
    box = (x * width / 100, y * height / 100, (x + w) * width / 100, (y + h) * height / 100)
    return Shape(label, what, box=box)


def _numbers(file: Path, given: list[Any], what: str) -> list[float]:
    numbers = []
    for value in given:
        number = as_finite(value)
        if number is None or not -10_000 <= number <= 10_000:
            raise damaged(file, f"{what} has {shown(value)} in place of percent", "export it again")
        numbers.append(number)
    return numbers


def _brush(file: Path, given: Any, size: tuple[int, int], what: str) -> np.ndarray:
    width, height = size
    try:
        codes = np.array(given if isinstance(given, list) else [], dtype=np.int64)
        if codes.ndim != 1 or not len(codes) or codes.min() < 0 or codes.max() > 255:
            raise ValueError("no list of bytes")
        pixels = unpack_runs(codes.astype(np.uint8), 4 * width * height)
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(
            "bad-rle", f"{file}: {what} has a brush that is damaged: {error}; draw it again"
        ) from error
    return pixels.reshape(height, width, 4)[:, :, 3] > 0


def unpack_runs(codes: np.ndarray, expected: int) -> np.ndarray:
    """Return the ``expected`` bytes of a run-length coding of thi.ng/rle-pack.

    A head has the number of words (32 bits), the bits of a word less 1 (5), and four sizes less 1 (4 each).
    Then follow blocks: one bit whether a word repeats, two bits for the size of a count, a count less 1, and
    the word, or as many words.

    Args:
        codes: (N,) uint8.
        expected: number of words, which must have 8 bits.

    Raises:
        ValueError: it is cut off, or of another size.
    """
    if expected > 4 * MOST_PIXELS:
        raise ValueError("more pixels than an image may have")
    bits = np.unpackbits(codes)
    text, place = (bits + ord("0")).tobytes().decode("ascii"), 0

    def number(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise ValueError("it is cut off")
        value = int(text[place : place + count], 2)
        place += count
        return value

    total, word = number(32), number(5) + 1
    if total != expected or word != 8:
        raise ValueError(f"{total} values of {word} bits, not {expected} of 8")
    sizes = [number(4) + 1 for _ in range(4)]
    found, done = np.zeros(total, dtype=np.uint8), 0
    while done < total:
        repeats = number(1)
        count = number(sizes[number(2)]) + 1
        if done + count > total:
            raise ValueError("more values than it says")
        if repeats:
            found[done : done + count] = number(word)
        else:
            if place + 8 * count > len(bits):
                raise ValueError("it is cut off")
            found[done : done + count] = np.packbits(bits[place : place + 8 * count])
            place += 8 * count
        done += count
    return found
