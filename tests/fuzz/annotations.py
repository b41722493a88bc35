"""Seeded damage to annotation files."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image

from gn_detect.data.coco.reader import LISTS

Content = dict[str, Any]

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 7, 0.5, -0.0, 1e9, -1e9, 1e300, float("nan"), float("inf"), 2**31, 2**63,
    -(2**63), 10**30, 10**400, "", "x", "1", "\ud800", "a\0b", "../..", "é" * 300, [], {}, [[]], [None], [1],
    [[1, 2, 3]], {"size": [1, 1], "counts": [1]}, {"size": None}, {"counts": ""}, [1e300] * 4,
    [-5, -5, 3, 3], [[[[]]]],
]  # fmt: skip
"""Values that do not belong."""


def write_base(folder: Path) -> Content:
    """Six images with polygons, both kinds of RLE, a crowd, and one image with nothing; returns the JSON."""
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    content: Content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "box"}, {"id": 7, "name": "bar"}],
    }
    for image_id in (11, 12, 13, 14, 15, 16):
        height, width = (64, 80) if image_id % 2 else (80, 64)
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / "images" / f"{image_id}.png"
        )
        record = {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
        content["images"].append(record)
        for kind in range(2) if image_id != 16 else ():
            x, y, w, h = 4 + 3 * kind, 5 + 30 * kind, 20 + 10 * kind, 24 - 8 * kind
            content["annotations"].append(_annotation(content, image_id, kind, [x, y, w, h], (height, width)))
    return content


def _annotation(
    content: Content, image_id: int, kind: int, box: list[int], size: tuple[int, int]
) -> dict[str, Any]:
    x, y, w, h = box
    number = len(content["annotations"])
    mask: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if number % 3:
        pixels = np.zeros(size, dtype=np.uint8, order="F")
        pixels[y : y + h, x : x + w] = 1
        mask = coco_mask.encode(pixels)
        mask = {"size": list(size), "counts": mask["counts"].decode()}
        if number % 3 == 2:
            edges = np.flatnonzero(np.diff(pixels.flatten(order="F"), prepend=0))
            mask["counts"] = np.diff([0, *edges, pixels.size]).tolist()
    return {
        "id": 101 + number,
        "image_id": image_id,
        "category_id": 3 + 4 * kind,
        "bbox": box,
        "area": w * h,
        "iscrowd": int(number == 5),
        "segmentation": mask,
    }


def mutate(base: Content, seed: int) -> tuple[str, str | bytes]:
    """The name of a mutation and the damaged file."""
    chance = random.Random(seed)
    if chance.random() < 0.12:
        return "text", _damaged_text(json.dumps(base), chance)
    content = copy.deepcopy(base)
    foreign = random.Random(f"foreign {seed}")  # of its own, so that older numbers stay what they are
    if foreign.random() < 0.35 and seed >= _FIRST_FOREIGN:
        name = foreign.choice(list(FOREIGN))
        changed = FOREIGN[name](content, foreign)
        return name, changed if isinstance(changed, str | bytes) else json.dumps(content)
    named = chance.random() < 0.6
    mutation = chance.choice(list(MUTATIONS.values())) if named else chance.choice(GENERIC)
    mutation(content, chance)
    return mutation.__name__.strip("_"), json.dumps(content)


def _damaged_text(text: str, chance: random.Random) -> str | bytes:
    at = chance.randrange(len(text))
    return chance.choice(
        [
            text[:at],
            text[:at] + chance.choice('{}[],:"0-e\x00\n\\') + text[at + 1 :],
            text[:at] + chance.choice(["NaN", "1" * 5000, "[" * 2000, "null", "\ufeff", '"']) + text[at:],
            text.encode()[:at] + b"\xff\xfe\x80" + text.encode()[at:],
            text.encode("utf-16"),
            "\ufeff" + text,
            text + text,
            "[]",
            "",
            json.dumps([text]),
        ]
    )


def _any_place(content: Content, chance: random.Random) -> tuple[Any, Any]:
    """A container somewhere below an entry, and a key in it."""
    node: Any = content[chance.choice(LISTS)]
    key: Any = chance.randrange(len(node))
    while isinstance(node[key], dict | list) and node[key] and chance.random() < 0.85:
        node = node[key]
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
    return node, key


def _junk_anywhere(content: Content, chance: random.Random) -> None:
    node, key = _any_place(content, chance)
    node[key] = copy.deepcopy(chance.choice(JUNK))


def _delete_anywhere(content: Content, chance: random.Random) -> None:
    node, key = _any_place(content, chance)
    del node[key]


def _move_anywhere(content: Content, chance: random.Random) -> None:
    (node, key), (other, place) = _any_place(content, chance), _any_place(content, chance)
    node[key] = copy.deepcopy(other[place])


def _repeat_anywhere(content: Content, chance: random.Random) -> None:
    entries = content[chance.choice(LISTS)]
    entries.insert(chance.randrange(len(entries) + 1), copy.deepcopy(chance.choice(entries)))


def _whole_list(content: Content, chance: random.Random) -> None:
    key = chance.choice(LISTS)
    if chance.random() < 0.3:
        del content[key]
    else:
        content[key] = copy.deepcopy(chance.choice(JUNK))


GENERIC: list[Callable[[Content, random.Random], None]] = [
    _junk_anywhere,
    _junk_anywhere,
    _junk_anywhere,
    _delete_anywhere,
    _move_anywhere,
    _repeat_anywhere,
    _whole_list,
]


def _set(
    part: str, **values: Callable[[dict, random.Random], Any]
) -> Callable[[Content, random.Random], None]:
    def mutation(content: Content, chance: random.Random) -> None:
        entry = chance.choice(content[part])
        for key, make in values.items():
            entry[key] = make(entry, chance)

    return mutation


def _with_polygons(change: Callable[[list, random.Random], Any]) -> Callable[[Content, random.Random], None]:
    def mutation(content: Content, chance: random.Random) -> None:
        chosen = [a for a in content["annotations"] if isinstance(a["segmentation"], list)]
        entry = chance.choice(chosen)
        entry["segmentation"] = change(entry["segmentation"], chance)

    return mutation


def _with_rle(change: Callable[[dict, random.Random], Any]) -> Callable[[Content, random.Random], None]:
    def mutation(content: Content, chance: random.Random) -> None:
        chosen = [a for a in content["annotations"] if isinstance(a["segmentation"], dict)]
        change(chance.choice(chosen)["segmentation"], chance)

    return mutation


def _shake_counts(mask: dict, chance: random.Random) -> None:
    counts = mask["counts"]
    at = chance.randrange(len(counts))
    if isinstance(counts, list):
        counts[at] += chance.choice([-5, 1, 10**6, -(10**6)])
    else:
        mask["counts"] = counts[:at] + chance.choice(["0", "o", "zz", "", "P1"]) + counts[at + 1 :]


MUTATIONS: dict[str, Callable[[Content, random.Random], None]] = {
    "duplicate-image-id": _set(
        "images", id=lambda e, c: c.choice([i for i in range(11, 17) if i != e["id"]])
    ),
    "duplicate-annotation-id": _set(
        "annotations", id=lambda e, c: c.choice([i for i in range(101, 111) if i != e["id"]])
    ),
    "duplicate-category-id": _set("categories", id=lambda e, c: 10 - e["id"]),
    "dangling-image": _set("annotations", image_id=lambda e, c: c.choice([0, 999, -1])),
    "dangling-category": _set("annotations", category_id=lambda e, c: c.choice([0, 5, -3])),
    "image-size": _set("images", height=lambda e, c: c.choice([0, -5, 10**9])),
    "missing-image": _set(
        "images", file_name=lambda e, c: c.choice(["gone.png", "x/11.png", "11.PNG", ".", ".."])
    ),
    "size-differs": _set("images", width=lambda e, c: e["width"] + c.choice([-1, 1, 40])),
    "bad-box": _set(
        "annotations", bbox=lambda e, c: c.choice([[1, 2, -3, 4], [1, 2, 3], [None] * 4, ["1"] * 4, {}])
    ),
    "box-outside": _set(
        "annotations", bbox=lambda e, c: c.choice([[300, 0, 9, 9], [-9, 0, 9, 9], [0, 90, 4, 4]])
    ),
    "bad-flag": _set("annotations", iscrowd=lambda e, c: c.choice([2, -1, "1", None, [0]])),
    "ignore": _set("annotations", ignore=lambda e, c: c.choice([1, True, 5, "x"])),
    "bad-area": _set(
        "annotations", area=lambda e, c: c.choice([-1, float("nan"), float("inf"), "9", None, 1e40])
    ),
    "no-mask": _set("annotations", segmentation=lambda e, c: c.choice([[], {}, None, ""])),
    "bad-polygon": _with_polygons(
        lambda p, c: c.choice([p[0], [[1e300] * 6], ["ab"], [[None] * 6], [[1, 2, "3"]], 5])
    ),
    "odd-polygon": _with_polygons(lambda p, c: c.choice([[p[0][:-1]], [p[0][:4]], [[]], [p[0], [1, 2]]])),
    "far-polygon": _with_polygons(lambda p, c: [[v * c.choice([1, 30, 1e5]) for v in p[0]]]),
    "rle-size": _with_rle(
        lambda m, c: m.update(size=c.choice([m["size"][::-1], [64], [1, 1], "x", [6.4, 80]]))
    ),
    "bad-rle": _with_rle(_shake_counts),
    "rle-type": _with_rle(
        lambda m, c: m.update(counts=c.choice([None, 5, [], "", [0.5], ["1"], {}, [2**70]]))
    ),
    "tiny-box": _set(
        "annotations", bbox=lambda e, c: c.choice([[1, 1, 0, 5], [5, 5, 1e-9, 1e-9], [1, 1, 1e-3, 9]])
    ),
    "wide-box": _set(
        "annotations", bbox=lambda e, c: c.choice([[-30, 0, 500, 9], [0, 0, 9e5, 9e5], [0, 0, 3e6, 5]])
    ),
    "nameless": _set("categories", name=lambda e, c: c.choice([None, 5, [], {}])),
    "same-name": _set("categories", name=lambda e, c: "box"),
    "wrong-area": _set("annotations", area=lambda e, c: e["area"] * c.choice([0, 3, 100])),
}
"""Each breaks one rule."""

for _name, _mutation in MUTATIONS.items():
    _mutation.__name__ = _name


_FIRST_FOREIGN = 10_000
"""Number of a case."""


def _entries(content: Content, chance: random.Random, *parts: str) -> list[dict[str, Any]]:
    """All entries of some lists, or one of them."""
    entries = [entry for part in parts for entry in content[part]]
    return entries if chance.random() < 0.6 else [chance.choice(entries)]


def _spell(value: Any, chance: random.Random) -> Any:
    """A number as other programs write it; anything in a list, too."""
    if isinstance(value, list):
        return [_spell(item, chance) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return chance.choice(
        [str(value), float(value), f"{float(value)}", f" {value} ", str(int(value)).zfill(12)]
    )


def _numbers_as_text(content: Content, chance: random.Random) -> None:
    keys = chance.choice(
        [
            ("id", "image_id"),
            ("id", "category_id"),
            ("height", "width"),
            ("bbox",),
            ("area",),
            ("iscrowd",),
            ("segmentation",),
            ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "height", "width"),
        ]
    )
    for entry in _entries(content, chance, *LISTS):
        for key in keys:
            if key in entry:
                entry[key] = _spell(entry[key], chance)


def _text_ids(content: Content, chance: random.Random) -> None:
    ending = chance.choice([".png", "\n", "", "$", "\x1b[1m"])
    for entry in content["images"]:
        entry["id"] = f"image {entry['id']}{ending}"
    for entry in content["annotations"]:
        entry["image_id"] = f"image {entry['image_id']}{ending}"


def _outlines(content: Content, chance: random.Random) -> None:
    for entry in _entries(content, chance, "annotations"):
        mask = entry["segmentation"]
        if isinstance(mask, list):
            flat = mask[0]
            pairs = [flat[i : i + 2] for i in range(0, len(flat), 2)]
            entry["segmentation"] = chance.choice(
                [
                    flat,
                    pairs,
                    [pairs],
                    [[pairs]],
                    [{"x": x, "y": y} for x, y in pairs],
                    json.dumps(mask),
                    [mask[0], []],
                ]
            )


def _long_outlines(content: Content, chance: random.Random) -> None:
    shape = chance.choice(
        [
            [value for i in range(300) for value in (0 if i % 2 else 9e5, i)],
            [value for i in range(300) for value in (i, -9e5 if i % 2 else 9e5)],
            [1.5, 2.5, 30.5, 40.25] * 250_000,
            [0, 0, 1e6, 1e6, 0, 1e6] * 100,
        ]
    )
    chance.choice(content["annotations"])["segmentation"] = [shape] * chance.choice(
        [1, 1, 50 if len(shape) < 1000 else 1]
    )


def _long_runs(content: Content, chance: random.Random) -> None:
    counts: Any = chance.choice(
        ["1M2", "1M2" * 9, "oooooo1", "0" * 10**6, "1" * 10**6, "ol0" * 10**5, [0] * 10**6, [2**40, 1]]
    )
    size = chance.choice([[64, 80], [10**5, 10**5], [10**9, 10**9], [1, 5120]])
    chance.choice(content["annotations"])["segmentation"] = {"size": size, "counts": counts}


def _many_categories(content: Content, chance: random.Random) -> None:
    number = chance.choice([1000, 10**5])
    content["categories"] += [{"id": i, "name": f"class {i}"} for i in range(100, 100 + number)]


def _many_entries(content: Content, chance: random.Random) -> None:
    part = chance.choice(["images", "annotations"])
    entries, first = content[part], 10_000
    content[part] = entries + [{**entries[0], "id": first + i} for i in range(200)]


def _file_names(content: Content, chance: random.Random) -> None:
    names = [
        "/dev/zero", "/dev/stdin", "../annotations.json", "../../../../etc/passwd", "/etc/hostname",
        "11.png\n12:00:00 error: forged", "\x1b[2J11.png", "$5_$9.png", "11.png?d=1", "%31%31.png",
        "images\\11.png", "C:\\data\\11.png", "/home/them/11.png", "./11.png", "x" * 5000, "\u202egnp.11",
        "11.png\0", "", ".", "nul", "http://127.0.0.1:9/11.png", "file:///etc/passwd", "~/11.png", "11.PNG",
        "\ud800.png", "11.png ", "/proc/self/mem",
    ]  # fmt: skip
    for entry in _entries(content, chance, "images"):
        entry["file_name"] = chance.choice(names)


def _class_names(content: Content, chance: random.Random) -> None:
    names = [
        "$5_$9",
        "a\nb",
        "\x1b[31m",
        "",
        " ",
        "total_loss",
        "AP",
        "é" * 2000,
        "<b>",
        "../x",
        "{}",
        "%s",
        "\u2028",
        3,
        3.5,
    ]
    for entry in _entries(content, chance, "categories"):
        entry["name"] = chance.choice(names)


def _fractions(content: Content, chance: random.Random) -> None:
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in _entries(content, chance, "annotations"):
        width, height = sizes[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x / width, y / height, w / width, h / height]


def _crowds(content: Content, chance: random.Random) -> None:
    for entry in _entries(content, chance, "annotations"):
        entry["iscrowd"] = 1


def _without(content: Content, chance: random.Random) -> None:
    key = chance.choice(
        ["area", "iscrowd", "bbox", "segmentation", "id", "image_id", "category_id", "height", "file_name"]
    )
    for entry in _entries(content, chance, *LISTS):
        entry.pop(key, None)


def _numbers(content: Content, chance: random.Random) -> None:
    value = chance.choice(
        [10**400, float("inf"), -float("inf"), float("nan"), -5, 0, 2**63, 1e308, 5e-324, True]
    )
    key = chance.choice(["height", "width", "area", "iscrowd", "id", "image_id", "category_id"])
    for entry in _entries(content, chance, *LISTS):
        if key in entry:
            entry[key] = value


def _boxes_alone(content: Content, chance: random.Random) -> None:
    for entry in content["annotations"]:
        entry["segmentation"] = chance.choice([[], None, {}, [[]]])


def _other_bytes(content: Content, chance: random.Random) -> str | bytes:
    text = json.dumps(content)
    return chance.choice(
        [
            b"\xef\xbb\xbf" + text.encode(),
            text.encode("utf-16"),
            text.encode("utf-32"),
            text.replace("box", "bo\u00e9").encode("latin-1"),
            "[" * 100_000,
            '{"images":' * 100_000,
            text[:-1] + ',"images":[]}',
            text.replace(" ", "\r\n"),
            "<annotation><size/></annotation>",
            "0 0.5 0.5 0.1 0.1\n",
            "names: [a, b]\ntrain: images\n",
            json.dumps({"version": "5", "shapes": [], "imagePath": "x", "imageHeight": 4, "imageWidth": 4}),
            json.dumps({"_via_img_metadata": {}, "_via_settings": {}}),
            json.dumps([{"data": {"image": "x"}, "annotations": []}]),
            text.encode() + bytes(10**6),
        ]
    )


FOREIGN: dict[str, Callable[[Content, random.Random], Any]] = {
    "numbers-as-text": _numbers_as_text,
    "text-ids": _text_ids,
    "outlines": _outlines,
    "long-outlines": _long_outlines,
    "long-runs": _long_runs,
    "many-categories": _many_categories,
    "many-entries": _many_entries,
    "file-names": _file_names,
    "class-names": _class_names,
    "fractions": _fractions,
    "crowds": _crowds,
    "without": _without,
    "numbers": _numbers,
    "boxes-alone": _boxes_alone,
    "other-bytes": _other_bytes,
}
"""What other programs write, and what is made to do harm; a change may return the text of the file."""


def changed_ids(base: Content, text: str | bytes) -> dict[str, set[Any]] | None:
    """Ids (and positions, as text) of entries that differ, by list; None where the file is no COCO at all."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in LISTS):
        return None
    changed: dict[str, set[Any]] = {}
    for key in LISTS:
        before = {json.dumps(entry) for entry in base[key]}
        after = [json.dumps(entry) for entry in content[key]]
        wrong = {i for i, entry in enumerate(after) if entry not in before or after.count(entry) > 1}
        entries = [content[key][i] for i in wrong] + [e for e in base[key] if json.dumps(e) not in set(after)]
        ids = {e["id"] for e in entries if isinstance(e, dict) and isinstance(e.get("id"), int)}
        changed[key] = ids | {f"{i} (counted from 0)" for i in wrong}
    return changed
