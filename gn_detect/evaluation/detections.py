"""Read COCO results into columns, checked many at a time.

A detection in the form that tools usually write, with integers as ids, four numbers and a compressed RLE, is
checked together with others by NumPy. Only the others pass through Python one by one: they are read in any
form of :mod:`gn_detect.data.coco.values`, or refused with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from ..data.coco.rle import measure
from ..data.coco.rules import Rules, shown
from ..data.coco.values import NUMBERS, as_integer, as_number, read_box, read_mask
from ..errors import UserError
from .coco_data import GroundTruth, Json, Size, encode
from .results_file import read_batches

_FARTHEST = 1e9  # the largest number in a detection's box
_HIGHEST = 1e300  # the largest score
_AT_ONCE = 200  # detections; pycocotools.mask.area fails on more than 255

_INTEGERS = frozenset((int,))
_NAMES = frozenset((int, str))


@dataclass(frozen=True)
class DetectionTable:
    """Detections as columns, in their order.

    Attributes:
        images, categories: (N,) int64, numbers of the ground truth.
        scores: (N,) float64.
        boxes: (N, 4) float64, x, y, width and height; those of the masks if only masks are evaluated.
        areas: by IoU type, (N,) float64 in square pixels: of the boxes, of the masks.
        sizes: (N, 2) int64, height and width of the masks; empty without masks.
        counts: compressed RLE of the masks; empty without masks.
    """

    images: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    areas: dict[str, np.ndarray]
    sizes: np.ndarray
    counts: list[str]

    def __len__(self) -> int:
        return len(self.scores)

    def entry(self, row: int, iou_type: str) -> Json:
        """Return a detection with the keys that evaluators read; ids begin with 1."""
        found: Json = {
            "id": row + 1,
            "image_id": int(self.images[row]),
            "category_id": int(self.categories[row]),
            "iscrowd": 0,
            "score": float(self.scores[row]),
            "bbox": self.boxes[row].tolist(),
            "area": float(self.areas[iou_type][row]),
        }
        return found | {"segmentation": self.mask(row)} if iou_type == "segm" else found

    def mask(self, row: int) -> Json:
        """Return a compressed RLE."""
        return {"size": self.sizes[row].tolist(), "counts": self.counts[row]}

    def masks(self, rows: np.ndarray) -> list[Json]:
        """Return the compressed RLE of some detections; those of one size share its list."""
        if not len(rows):
            return []
        height, width = self.sizes[rows].T
        _, first, own = np.unique((height << 32) + width, return_index=True, return_inverse=True)
        lists, counts = self.sizes[rows[first]].tolist(), self.counts
        places = zip(own.tolist(), rows.tolist(), strict=True)
        return [{"size": lists[i], "counts": counts[row]} for i, row in places]


def prepare_detections(
    source: str | Path | Sequence[Mapping[str, Any]], truth: GroundTruth, iou_types: Sequence[str]
) -> DetectionTable:
    """Read detections in any form, all of them checked.

    Args:
        source: COCO result file or its content, which is not changed. Ids may be those of the annotation file
            or of ``truth``. A detection without ``bbox`` has its mask's box (and area, as in pycocotools).
        truth: the ground truth.
        iou_types: ``"bbox"``, ``"segm"`` or both.

    Raises:
        UserError: it is no list of results, or one has an unknown image or category or no finite score.
    """
    name = str(source) if isinstance(source, str | Path) else "results"
    if isinstance(source, str | Path):
        entries: Iterable[Any] = chain.from_iterable(read_batches(source))
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        entries = source
    else:
        raise UserError("not-results", f"{name}: not COCO results; it needs a list of detections")
    reader = _Reader(name, truth, iou_types)
    return reader.table(reader.parts(iter(entries)))


# One part of a table: images, categories, scores, boxes, mask areas, mask sizes, counts.
_Part = tuple[list[int], list[int], np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]


class _Reader:
    def __init__(self, name: str, truth: GroundTruth, iou_types: Sequence[str]) -> None:
        self.one_by_one = _DetectionReader(name, truth)
        self.boxes, self.masks = "bbox" in iou_types, "segm" in iou_types
        # Ids that are text, or too large, count as the file spells them. A text never equals a number.
        self.images, self.categories = (
            {spelt: numbers[i] for spelt, i in ids.items() if type(spelt) in _NAMES} | numbers
            for ids, numbers in zip(self.one_by_one.spelt, (truth.images, truth.categories), strict=True)
        )
        self.sizes = np.full((len(truth.images) + 1, 2), -1, dtype=np.int64)
        for number, size in truth.sizes.items():
            self.sizes[number] = size or (-1, -1)

    def table(self, parts: Iterable[_Part]) -> DetectionTable:
        columns: tuple[list[Any], ...] = ([], [], [], [], [], [], [])
        for part in parts:
            for column, values in zip(columns, part, strict=True):
                if isinstance(values, list):
                    column += values
                else:
                    column.append(values)
        images, categories, scores, boxes, mask_areas, sizes, counts = columns
        corners = np.concatenate([np.empty((0, 4)), *boxes])
        areas = {"bbox": corners[:, 2] * corners[:, 3]} if self.boxes else {}
        return DetectionTable(
            np.array(images, dtype=np.int64),
            np.array(categories, dtype=np.int64),
            np.concatenate([np.empty(0), *scores]),
            corners,
            areas | ({"segm": np.concatenate([np.empty(0), *mask_areas])} if self.masks else {}),
            np.concatenate([np.empty((0, 2), dtype=np.int64), *sizes]),
            counts,
        )

    def parts(self, entries: Iterator[Any]) -> Iterator[_Part]:
        first = 1
        while batch := list(islice(entries, _AT_ONCE)):
            yield from self.split(batch, first)
            first += len(batch)

    def split(self, batch: list[Any], first: int) -> Iterator[_Part]:
        """Yield a batch in parts: whole if all of it is in the usual form, or else halved again and again.

        Args:
            batch: entries of results.
            first: number of the first one, from 1.
        """
        part = self.in_bulk(batch)
        if part is not None:
            yield part
        elif len(batch) == 1:
            yield self.single(batch[0], first)
        else:
            half = len(batch) // 2
            yield from self.split(batch[:half], first)
            yield from self.split(batch[half:], first + half)

    def in_bulk(self, batch: list[Any]) -> _Part | None:
        """Return a part of detections that are all in the usual form and right, or None."""
        try:
            image_ids, category_ids, given = zip(*map(_KEYS, batch), strict=True)
            if not _NAMES.issuperset(map(type, image_ids + category_ids)):
                return None
            images = [self.images[i] for i in image_ids]
            categories = [self.categories[i] for i in category_ids]
            scores = _numbers(given)
            if scores is None or not (np.abs(scores) <= _HIGHEST).all():
                return None
            boxes = _boxes(batch) if self.boxes else np.empty((0, 4))
            if boxes is None:
                return None
            if not self.masks:
                return images, categories, scores, boxes, _NONE, _NO_SIZES, []
            masks = _masks(batch, self.sizes[images])
            if masks is None:
                return None
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        counts, sizes, areas = masks
        if not self.boxes:
            rles = [{"size": s, "counts": c} for s, c in zip(sizes.tolist(), counts, strict=True)]
            boxes = np.asarray(coco_mask.toBbox(rles))
        return images, categories, scores, boxes, areas, sizes, counts

    def single(self, given: Any, number: int) -> _Part:
        """Return a part of one detection, in any form.

        Raises:
            UserError: it is wrong.
        """
        what = f"detection {number}"
        image, category, score = self.one_by_one.ids_and_score(given, what)
        box = self.one_by_one.box(given, image, what) if self.boxes else None
        sizes, areas, counts = _NO_SIZES, _NONE, []
        if self.masks:
            mask = self.one_by_one.mask(given, image, what)
            sizes, counts = np.array([mask["size"]], dtype=np.int64), [mask["counts"]]
            areas = np.array([float(coco_mask.area(mask))])
            box = coco_mask.toBbox(mask).tolist() if box is None else box
        return [image], [category], np.array([score]), np.array([box]), areas, sizes, counts


_KEYS = itemgetter("image_id", "category_id", "score")
_NONE, _NO_SIZES = np.empty(0), np.empty((0, 2), dtype=np.int64)


def _numbers(given: Sequence[Any]) -> np.ndarray | None:
    """Return plain numbers as float64; None if one is none."""
    return np.array(given, dtype=np.float64) if NUMBERS.issuperset(map(type, given)) else None


def _boxes(batch: list[Any]) -> np.ndarray | None:
    given = [entry["bbox"] for entry in batch]
    if {list} != set(map(type, given)) or {4} != set(map(len, given)):
        return None
    numbers = _numbers(list(chain.from_iterable(given)))
    near = numbers is not None and (np.abs(numbers) <= _FARTHEST).all()
    return numbers.reshape(-1, 4) if near and numbers is not None else None


def _masks(batch: list[Any], sizes: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Return counts, sizes and areas."""
    given = [entry["segmentation"] for entry in batch]
    if {dict} != set(map(type, given)):
        return None
    counts, own = [mask["counts"] for mask in given], [mask["size"] for mask in given]
    if {str} != set(map(type, counts)) or {list} != set(map(type, own)) or {2} != set(map(len, own)):
        return None
    flat = list(chain.from_iterable(own))
    if not _INTEGERS.issuperset(map(type, flat)) or flat != sizes.reshape(-1).tolist():
        return None
    pixels, areas = measure(counts)
    whole = (pixels == sizes[:, 0] * sizes[:, 1]).all()
    return (counts, sizes, areas.astype(np.float64)) if whole else None


class _DetectionReader:
    """Reads detections one by one, in any form."""

    def __init__(self, name: str, truth: GroundTruth) -> None:
        self.rules, self.truth = Rules(Path(name)), truth
        file = truth.file
        self.spelt = [{spelt: i for i, spelt in ids.items()} for ids in (file.image_ids, file.category_ids)]

    def ids_and_score(self, given: Any, what: str) -> tuple[int, int, float]:
        if not isinstance(given, Mapping):
            raise self._refusal(what, "it is not an object")
        image = self._number(given, "image", self.truth.images, self.spelt[0], what)
        category = self._number(given, "category", self.truth.categories, self.spelt[1], what)
        return image, category, self._score(given, what)

    def box(self, given: Mapping[str, Any], image: int, what: str) -> list[float]:
        """Return x, y, width and height: the mask's, if there is no box."""
        if given.get("bbox") is None:
            box: list[float] = coco_mask.toBbox(self.mask(given, image, what)).tolist()
            return box
        found = read_box(given["bbox"], set())
        if not isinstance(found, list) or len(found) != 4 or not all(map(_is_near, found)):
            raise self._refusal(what, f"its bbox {shown(found)} is not x, y, width, height in finite numbers")
        return [float(value) for value in found]

    def mask(self, given: Mapping[str, Any], image: int, what: str) -> Json:
        size: Size = self.truth.sizes[image]
        encoded = encode(read_mask(given.get("segmentation"), set()), size, self.rules, what)
        if encoded is None:
            raise self._refusal(what, "it has no polygon of at least 3 points")
        return encoded

    def _number(
        self, given: Mapping[str, Any], kind: str, numbers: dict[int, int], spelt: dict[Any, int], what: str
    ) -> int:
        key = given.get(f"{kind}_id")
        number = numbers.get(key) if type(key) is int else None
        if number is None and key is not None and not isinstance(key, list | dict):
            number = numbers.get(spelt.get(key, as_integer(key)))  # type: ignore[arg-type]
        if number is None:
            reason = f"it is of {kind} {shown(key)}, which the ground truth does not list"
            raise self._refusal(what, reason if f"{kind}_id" in given else f"it has no '{kind}_id'")
        return number

    def _score(self, given: Mapping[str, Any], what: str) -> float:
        if "score" not in given:
            raise self._refusal(what, "it has no 'score'")
        score = as_number(given["score"])
        if score is None:
            raise self._refusal(what, f"its score {shown(given['score'])} is not a number")
        if not abs(score) <= _HIGHEST:  # nan is not, either
            raise self._refusal(what, f"its score is {shown(score)}, which is not finite")
        return float(score)

    def _refusal(self, what: str, reason: str) -> UserError:
        return self.rules.error("malformed", f"{what} cannot be evaluated: {reason}; correct or remove it")


def _is_near(value: Any) -> bool:
    return as_number(value) is not None and abs(value) <= _FARTHEST
