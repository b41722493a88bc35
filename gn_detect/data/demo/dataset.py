"""The demo dataset: shapes on textured backgrounds, generated from a seed at first use, not downloaded.

The eight categories differ only in shape; colours and textures have the same distribution for all. Masks are
exact: each object is painted on the pixels of its annotation, which is COCO's rasterisation of its outline
without the parts that later objects hide.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image

from ...errors import UserError
from ...files import atomic_write_json
from ...progress import announced
from .shapes import CATEGORIES, MAX_SIZE, MIN_SIZE, background, finish, make_outline, object_texture

logger = logging.getLogger(__name__)

VERSION = 3  # raise it with every change of pictures or annotations: older copies are then replaced

TRAIN_SEED, VAL_SEED = 1, 2
MIN_VISIBLE = 0.5  # least part of an object that is neither hidden nor outside the image

_STAMP = "generated_by_gn_detect.json"
_COUNT_WEIGHTS = (6, 10, 15, 16, 15, 11, 8, 5, 4, 3, 2, 2)  # of 1 to 12 objects in a picture
_TRIES = 30
# Most pixels of a polygon outside the object's box. A star's tip may be thinner than a pixel: polygon and box
# would disagree.
_TIP = 2.0
_LICENSE = {"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}


@dataclass
class SceneObject:
    """A placed object, or a crowd of small objects of a category.

    Attributes:
        category_id: key of ``CATEGORIES``.
        polygon: outline as COCO's flat list, or None if polygons cannot describe the object (hole, cropped,
            crowd, long thin tip).
        area: pixels of the whole object, with hidden and outside parts.
        members: (H, W) bool masks inside the image: one for an object, many for a crowd.
        crowd: True for a crowd.
    """

    category_id: int
    polygon: list[float] | None
    area: int
    members: list[np.ndarray]
    crowd: bool = False


@dataclass
class Scene:
    """All objects of a picture; ``owner`` (H, W) int16 is the index of the object on top, -1 for none."""

    height: int
    width: int
    objects: list[SceneObject]
    owner: np.ndarray


def make_image(seed: int, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return picture ``index`` of the dataset part with this seed, and its annotations.

    Returns:
        uint8 RGB (H, W, 3) and COCO annotations, without ``id`` and ``image_id``. ``segmentation`` is a
        polygon, a compressed RLE or, for a crowd, an uncompressed RLE; ``bbox`` and ``area`` are those of the
        visible mask.
    """
    scene = lay_out_scene(seed, index)
    return paint(scene, seed, index), annotate(scene)


def lay_out_scene(seed: int, index: int) -> Scene:
    """Place objects on top of one another so that enough of each stays visible; see :func:`make_image`.

    The layout has its own random numbers, which Python keeps stable between versions. So annotations are the
    same everywhere, and only textures may vary with NumPy and Pillow.
    """
    random = Random(f"{seed}/{index}")
    area, aspect = random.uniform(205, 300) ** 2, math.exp(random.uniform(-0.3, 0.3))
    height, width = (min(max(round(math.sqrt(a)), 192), 320) for a in (area * aspect, area / aspect))
    scene = Scene(height, width, [], np.full((height, width), -1, dtype=np.int16))
    if random.random() < 0.03:
        return scene
    count = random.choices(range(1, len(_COUNT_WEIGHTS) + 1), _COUNT_WEIGHTS)[0]
    if random.random() < 0.05:
        _place(scene, _crowd(scene, random))
        count = min(count, 4)
    for _ in range(count):
        for _ in range(_TRIES):
            if _place(scene, _single(scene, random)):
                break
    return scene


def _single(scene: Scene, random: Random) -> SceneObject:
    """Return an object of random category, size and place, not yet part of the scene."""
    category_id = random.choice(list(CATEGORIES))
    low, high = (32, 112) if random.random() < 0.8 else (MIN_SIZE + 1, MAX_SIZE - 1)
    size = math.exp(random.uniform(math.log(low), math.log(high)))
    outline = make_outline(category_id, size, random)
    # Most objects lie inside the image. Some reach out of it, and are not placed if they do so too far.
    margin = size * (0.05 if random.random() < 0.15 else 0.5)
    outline = outline.moved(
        random.uniform(margin, scene.width - margin), random.uniform(margin, scene.height - margin)
    )
    if outline.inside(scene.height, scene.width):
        mask = outline.mask(scene.height, scene.width)
        x, y, width, height = _box(mask)
        beyond = max(((x, y) - outline.outer).max(), (outline.outer - (x + width, y + height)).max())
        describes = outline.hole is None and beyond <= _TIP
        polygon = outline.outer.reshape(-1).tolist() if describes else None
        return SceneObject(category_id, polygon, int(mask.sum()), [mask])
    around = MAX_SIZE
    whole = outline.moved(around, around).mask(scene.height + 2 * around, scene.width + 2 * around)
    return SceneObject(category_id, None, int(whole.sum()), [whole[around:-around, around:-around]])


def _crowd(scene: Scene, random: Random) -> SceneObject:
    """Return small objects of one category on a jittered grid inside the image."""
    category_id = random.choice(list(CATEGORIES))
    columns, rows, cell = random.randint(4, 6), random.randint(3, 5), random.uniform(15, 19)
    left = random.uniform(2, scene.width - columns * cell - 2)
    top = random.uniform(2, scene.height - rows * cell - 2)
    members = []
    for row in range(rows):
        for column in range(columns):
            outline = make_outline(category_id, random.uniform(MIN_SIZE + 1, cell - 1), random)
            x, y = (n + 0.5 + random.uniform(-0.08, 0.08) for n in (column, row))
            members.append(outline.moved(left + x * cell, top + y * cell).mask(scene.height, scene.width))
    area = int(np.logical_or.reduce(members).sum())
    return SceneObject(category_id, None, area, members, crowd=True)


def _place(scene: Scene, new: SceneObject) -> bool:
    """Put ``new`` on top and return True, if then every object, also ``new``, stays visible enough."""
    mask = np.logical_or.reduce(new.members)
    owner = np.where(mask, np.int16(len(scene.objects)), scene.owner)
    for index, thing in enumerate([*scene.objects, new]):
        visible = owner == index
        if visible.sum() < MIN_VISIBLE * thing.area:
            return False
        if not MIN_SIZE <= max(_box(visible)[2:]) <= MAX_SIZE:
            return False
    scene.objects.append(new)
    scene.owner = owner
    return True


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the tight ``x, y, width, height`` of a bool mask that is not empty, in whole pixels."""
    x, y = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (0, 1))
    return x[0], y[0], x[-1] - x[0] + 1, y[-1] - y[0] + 1


def paint(scene: Scene, seed: int, index: int) -> np.ndarray:
    """Return the scene's picture, uint8 RGB (H, W, 3)."""
    random = np.random.default_rng([seed, index])
    canvas = background(scene.height, scene.width, random)
    top = np.full(scene.owner.shape, -1)
    for number, thing in enumerate(scene.objects):
        for mask in thing.members:
            x, y, width, height = _box(mask)
            window = np.s_[y : y + height, x : x + width]
            inside = mask[window]
            below = top[window][inside]
            covered = [canvas[window][inside][below == n].mean(axis=0) for n in np.unique(below)]
            canvas[window][inside] = object_texture(height, width, covered, random)[inside]
            top[window][inside] = number
    return finish(canvas, random)


def annotate(scene: Scene) -> list[dict[str, Any]]:
    """Return COCO annotations of the visible part of each object; see :func:`make_image`."""
    annotations = []
    for number, thing in enumerate(scene.objects):
        visible = scene.owner == number
        area = int(visible.sum())
        segmentation: Any
        if thing.crowd:
            segmentation = _uncompressed_rle(visible)
        elif thing.polygon is not None and area == thing.area:
            segmentation = [thing.polygon]
        else:
            segmentation = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
            segmentation["counts"] = segmentation["counts"].decode("ascii")
        annotations.append(
            {
                "category_id": thing.category_id,
                "iscrowd": int(thing.crowd),
                "bbox": list(_box(visible)),
                "area": area,
                "segmentation": segmentation,
            }
        )
    return annotations


def _uncompressed_rle(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's plain form: lengths of runs down the columns, first of zeros (perhaps none)."""
    pixels = mask.reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff(np.concatenate([[0], edges, [pixels.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def ensure_demo_dataset(root: Path, num_train: int = 400, num_val: int = 100) -> None:
    """Generate the dataset in ``<root>/demo`` if it is missing, incomplete or outdated.

    The folder gets ``images_train/``, ``images_val/``, ``instances_train.json``, ``instances_val.json`` and a
    stamp with the generator's version. It is built under another name and then renamed, so an interruption
    leaves no partial folder, and several processes may start together.

    Args:
        root: folder of all datasets; created if it is missing.
        num_train, num_val: number of pictures in each part.

    Raises:
        UserError: ``<root>/demo`` is another folder of the user, or cannot be written.
    """
    folder = Path(root) / "demo"
    stamp = {"version": VERSION, "num_train": num_train, "num_val": num_val}
    if _is_complete(folder, stamp):
        return
    building = folder.with_name(f".demo-{uuid.uuid4().hex}")
    outdated = building.with_suffix(".old")
    try:
        if folder.exists() and not (folder / _STAMP).is_file():
            raise UserError(
                "replaced-file",
                f"{folder} was not generated by gn_detect; move it away or choose another datasets folder",
            )
        building.mkdir(parents=True)
        _write_part(building, "train", TRAIN_SEED, num_train)
        _write_part(building, "val", VAL_SEED, num_val)
        atomic_write_json(building / _STAMP, stamp)
        if not _is_complete(folder, stamp):
            with contextlib.suppress(FileNotFoundError):  # nothing is there, or another process renamed it
                folder.rename(outdated)
        building.rename(folder)
    except OSError as error:
        if not _is_complete(folder, stamp):  # else another process was faster, with the same copy
            reason = error.strerror or error
            raise UserError(
                "cannot-write", f"cannot write {folder}: {reason}; choose another datasets folder"
            ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)


def _is_complete(folder: Path, stamp: dict[str, int]) -> bool:
    """Return whether the stamp is this one and no file is missing; contents are not checked."""
    try:
        found = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
        return found == stamp and all(
            (folder / f"instances_{part}.json").is_file()
            and sum(1 for _ in (folder / f"images_{part}").glob("[!.]*.jpg")) == stamp[f"num_{part}"]
            for part in ("train", "val")
        )
    except (OSError, ValueError):
        return False


def _write_part(folder: Path, part: str, seed: int, count: int) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / f"images_{part}").mkdir()
    for index in announced(range(count), f"generating pictures of demo_{part}", "picture", logger):
        pixels, found = make_image(seed, index)
        image_id = seed * 100_000 + index
        name = f"{image_id}.jpg"
        Image.fromarray(pixels).save(folder / f"images_{part}" / name, quality=95, subsampling=0)
        height, width = pixels.shape[:2]
        images.append({"id": image_id, "file_name": name, "height": height, "width": width, "license": 1})
        for annotation in found:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    content = {
        "info": {"description": f"gn_detect demo, {part} part, seed {seed}", "version": str(VERSION)},
        "licenses": [_LICENSE],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in CATEGORIES.items()],
        "images": images,
        "annotations": annotations,
    }
    atomic_write_json(folder / f"instances_{part}.json", content)
