"""Read YOLO labels: boxes and polygons in fractions of the image, one text file for each image.

``data.yaml`` names the classes and the folders of images. A folder without one has the classes in
``classes.txt``, or numbers. The labels of ``images/a.jpg`` are ``labels/a.txt``, else ``a.txt`` in its
folder.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...config.yaml_text import parse_yaml
from ...errors import UserError
from ..coco.rules import MOST_CATEGORIES, shown
from .builder import PART_WORDS, PARTS, WHOLE, Builder, Imported, Shape
from .image_index import ImageIndex
from .source_files import as_finite, damaged, label_files, numbered_lines, read_labels

_CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt")

# A number as a key, as in ``0: cat``; the config's reader of YAML has text alone.
_NUMBER_KEY = re.compile(r"(^[ \t]*|[{,][ \t]*)(\d+)([ \t]*:[ \t])", re.MULTILINE)

# Numbers of objects at the border may be rounded up so far, and are cut to the border.
_ROUNDED = 0.01


def read(path: Path, index: ImageIndex) -> Imported:
    """Read a ``data.yaml``, a folder that holds one, or a folder of labels and images."""
    file = path if path.is_file() else _data_yaml(path)
    if file is not None and file.suffix.lower() in (".yaml", ".yml"):
        return _read_yaml(file, index)
    if path.is_file():
        raise UserError("unknown-format", f"{path} has the labels of one image; give its folder")
    return _read_folder(path, index)


def _data_yaml(folder: Path) -> Path | None:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".yaml", ".yml"))
    files = [file for file in files if file.name.startswith("data.")] or files
    named = [file for file in files if re.search(r"^(names|nc)\s*:", read_labels(file), re.MULTILINE)]
    if len(named) > 1:
        raise UserError("unknown-format", f"{folder} holds {named[0].name} and {named[1].name}; give one")
    return named[0] if named else None


def _read_yaml(file: Path, index: ImageIndex) -> Imported:
    try:
        content = parse_yaml(_NUMBER_KEY.sub(r'\1"\2"\3', read_labels(file)))
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError("not-yaml", f"{file}: not YAML: {problem}{where}; correct it") from error
    if not isinstance(content, dict):
        raise damaged(file, "it has no keys", "give it 'names' and 'train'")
    if "kpt_shape" in content:
        raise damaged(file, "its labels have keypoints ('kpt_shape')", "give boxes or polygons")
    names = _names(content, file)
    builder = Builder("YOLO", index, names)
    builder.sources.add(file)
    if content.get("download"):
        builder.note("'download' is never run", str(file))
    base = _base(content, file, builder)
    for part in PARTS:
        keys = [key for key, meant in PART_WORDS.items() if meant == part and content.get(key)]
        given = content[keys[0]] if keys else None
        for place in given if isinstance(given, list) else [given] if given is not None else []:
            if not isinstance(place, str):
                raise damaged(file, f"{part!r} is {shown(place)}", "give folders as text")
            _read_place(_place(place, base, file, builder), part, builder, names, file)
    if not builder.images:
        raise damaged(file, "it names no folder of images", "give it 'train' and 'val'")
    return builder.finish()


def _names(content: dict[str, Any], file: Path) -> list[str]:
    names, count = content.get("names"), content.get("nc")
    if names is None and isinstance(count, int) and 0 < count <= MOST_CATEGORIES:
        return [str(number) for number in range(count)]
    if isinstance(names, dict):
        numbers = {key if isinstance(key, str) else shown(key): name for key, name in names.items()}
        wanted = [str(number) for number in range(len(names))]
        if sorted(numbers) != sorted(wanted):
            raise damaged(
                file, "'names' is not numbered from 0 without a gap", "number the classes 0, 1, ..."
            )
        names = [numbers[number] for number in wanted]
    if not isinstance(names, list) or not names:
        raise damaged(file, f"'names' is {shown(names)}", "give it the list of classes")
    if any(isinstance(name, list | dict) or name is None for name in names):
        raise damaged(file, "'names' holds an entry that is no name", "give it the list of classes")
    names = [str(name).strip() for name in names]
    if count is not None and count != len(names):
        raise damaged(file, f"'nc' is {shown(count)}, but 'names' has {len(names)}", "correct one of them")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise damaged(file, f"'names' has {twice!r} twice", "give each class its own name")
    return names


def _base(content: dict[str, Any], file: Path, builder: Builder) -> Path:
    """Return the folder to which the places of a ``data.yaml`` are relative."""
    given = content.get("path")
    if not given:
        return file.parent
    if not isinstance(given, str):
        raise damaged(file, f"'path' is {shown(given)}", "give the folder of the data, or leave it out")
    base = Path(os.path.normpath(file.parent / given))
    if os.path.isdir(base):
        builder.index.check(base, f"{file}: 'path' {given!r}")
        return base
    builder.note("'path' names no folder here; the folder of data.yaml is taken", given)
    return file.parent


def _place(place: str, base: Path, file: Path, builder: Builder) -> Path:
    """Return a folder or list of images; Roboflow writes ``../train/images`` for one next to data.yaml."""
    shorter = re.sub(r"^(\.\.[/\\])+", "", place)
    tried = [base / place, base / shorter, file.parent / shorter]
    if os.path.isabs(place):
        tried += [file.parent / Path(*Path(place).parts[-n:]) for n in (3, 2, 1)]
    found = [path for path in map(Path, map(os.path.normpath, tried)) if os.path.exists(path)]
    inside = [path for path in found if builder.index.allow_outside or builder.index.holds(path)]
    if inside:
        return inside[0]
    if found:
        builder.index.check(found[0], f"{file}: {place!r}")
    raise damaged(
        file, f"there is no {place!r} in {base}", "correct the path, or name the folder by --images"
    )


def _read_place(place: Path, part: str, builder: Builder, names: list[str], file: Path) -> None:
    if place.is_file() and place.suffix.lower() != ".txt":
        raise damaged(file, f"{place} is neither a folder nor a list of images", "give the folder")
    if place.is_file():
        builder.sources.add(place)
        paths = [
            builder.find_image(line, place, f"line {n}") for n, line in numbered_lines(read_labels(place))
        ]
    else:
        paths = builder.index.all(place)
        folders = {path.parent for path in paths}
        root = builder.index.root
        expected = {label_file(path, root) for path in paths}
        _check_strays(place, expected, {label_file(folder / "_", root).parent for folder in folders})
    missing = label_file(paths[0], builder.index.root) if paths else place
    if not any(label_file(path, builder.index.root).is_file() for path in paths):
        if part == "test":  # to predict on, but not to evaluate
            builder.note("a test part without labels is left out", str(place))
            return
        raise UserError(
            "missing-annotations",
            f"{file}: no image of {place} has a label file, such as {missing}; put the labels there",
        )
    for path in paths:
        _read_image(path, part, builder, names)


def label_file(image: Path, root: Path) -> Path:
    """Return the place of an image's labels: the last folder ``images`` below the root becomes ``labels``."""
    parts = list(image.parts)
    first = len(root.parts) if image.is_relative_to(root) else 0
    for position in range(len(parts) - 2, first - 1, -1):
        if parts[position].lower() == "images":
            parts[position] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _check_strays(place: Path, expected: set[Path], folders: set[Path]) -> None:
    """Refuse labels without an image, whose objects would be lost without a word."""
    for folder in sorted(folders):
        if folder.name != "labels" and "labels" not in folder.parts:
            continue
        for file in sorted(folder.glob("*.txt")) if folder.is_dir() else []:
            if file not in expected and file.name not in _CLASS_FILES and read_labels(file).strip():
                raise UserError("missing-image", f"{file}: there is no image for it in {place}; restore it")


def _read_folder(folder: Path, index: ImageIndex) -> Imported:
    labels = label_files(folder, "*.txt")
    lists = [path for path in labels if path.name in _CLASS_FILES]
    lists += [path for path in label_files(folder, "obj.names") if path not in lists]
    names, files = None, {path for path in labels if path not in lists}
    if lists:
        names = [line for _, line in numbered_lines(read_labels(lists[0]))]
        if len(set(names)) < len(names):
            raise damaged(lists[0], "it has a class twice", "give each class its own name")
    pairs = list(_pairs(index, files))
    count = len(names) if names is not None else 1 + _largest_class(file for _, file in pairs if file)
    builder = Builder("YOLO", index, names or [str(number) for number in range(max(count, 1))])
    if names is None:
        builder.note(
            "classes have no names, and get their numbers: add classes.txt or data.yaml", str(folder)
        )
    builder.sources.update(lists[:1])
    used = {file for _, file in pairs if file is not None}
    for file in sorted(files.difference(used)):
        lines = [line for _, line in numbered_lines(read_labels(file))]
        if lines and re.fullmatch(r"\d+(\s+[\d.eE+-]+){4,}", lines[0]):
            raise UserError("missing-image", f"{file}: there is no image for it in {index.root}; restore it")
    for image, labels_of in pairs:
        _read_image(image, WHOLE, builder, builder.classes or [], labels_of)
    return builder.finish()


def _pairs(index: ImageIndex, files: set[Path]) -> Iterator[tuple[Path, Path | None]]:
    """Yield each image with its label file, by the usual place, or as the only one with its stem."""
    images, by_stem = index.all(), {file.stem: file for file in files}
    stems, label_stems = (Counter(path.stem for path in paths) for paths in (images, files))
    for image in images:
        usual = label_file(image, index.root)
        alone = stems[image.stem] == 1 and label_stems[image.stem] == 1
        yield image, usual if usual in files else by_stem[image.stem] if alone else None


def _largest_class(files: Iterator[Path]) -> int:
    """Return the largest number of a class; the lines are checked later."""
    largest = -1
    for file in files:
        for _, line in numbered_lines(read_labels(file)):
            first = line.split(None, 1)[0]
            if first.isdigit() and len(first) < 10:
                largest = max(largest, int(first))
    return min(largest, MOST_CATEGORIES)


def _read_image(path: Path, part: str, builder: Builder, names: list[str], file: Path | None = None) -> None:
    labels = label_file(path, builder.index.root) if file is None else file
    if not labels.is_file():
        builder.note("images have no label file, and count as images without an object", str(path))
        builder.add_image(path, path, "the image", part)
        return
    image = builder.add_image(path, labels, "its image", part)
    size = (image.record.width, image.record.height)
    lines = numbered_lines(read_labels(labels))
    shapes = [_shape(line.split(), names, size, labels, f"line {number}") for number, line in lines]
    if not shapes:
        builder.note("label files are empty", str(labels))
    builder.add(image, shapes)


def _shape(words: list[str], names: list[str], size: tuple[int, int], file: Path, what: str) -> Shape:
    """Return the shape of a line: class and centre and size, or class and points."""
    numbers = [as_finite(word) for word in words]
    if any(number is None for number in numbers):
        wrong = words[numbers.index(None)]
        raise damaged(file, f"{what} has {wrong[:40]!r}, which is no number", "correct it")
    first, *values = [number for number in numbers if number is not None]
    if not first.is_integer() or not 0 <= first < len(names):
        known = f"the {len(names)} classes are numbered from 0"
        raise UserError(
            "dangling-category",
            f"{file}: {what} has the class {words[0][:40]}, but {known}; correct it, or add the name",
        )
    if len(values) < 4 or len(values) == 5 or (len(values) > 4 and len(values) % 2):
        raise damaged(
            file,
            f"{what} has {len(values)} numbers after its class",
            "a box has 4 (centre, width, height), a polygon 6 or more in pairs",
        )
    if not all(-_ROUNDED <= value <= 1 + _ROUNDED for value in values):
        wrong = next(w for w, v in zip(words[1:], values, strict=True) if not -_ROUNDED <= v <= 1 + _ROUNDED)
        raise UserError(
            "fractions",
            f"{file}: {what} has {wrong[:40]}, but YOLO's numbers are fractions of the image, from 0 to 1; "
            "divide pixels by its width and height",
        )
    width, height = size
    label = names[int(first)]
    if len(values) == 4:
        x, y, w, h = values
        sides = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        x0, y0, x1, y1 = (min(max(side, 0.0), 1.0) for side in sides)
        return Shape(label, what, box=(x0 * width, y0 * height, x1 * width, y1 * height))
    points = [min(max(value, 0.0), 1.0) * size[place % 2] for place, value in enumerate(values)]
    return Shape(label, what, polygons=[[round(point, 6) for point in points]])
