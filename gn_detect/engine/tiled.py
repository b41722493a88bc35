"""Detect in tiles of an image, and join the parts of the objects that the tiles cut.

Two tiles that overlap both see the zone that they share. So two detections show the same object if their
masks agree in that zone, however much of the object each tile shows. A mask is kept as RLE of the whole
image: a few hundred bytes, whatever its size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from ..data.augmentation import shortest_edge_size
from ..data.tiles import tile_windows
from ..data.transforms import resize_pixels, to_tensor
from ..evaluation.model import Detector, encode_part, mask_parts
from ..modeling.mask_rcnn import image_size
from ..structures import Detections, RleMasks

if TYPE_CHECKING:
    from ..config import Config

AGREE = 0.5  # IoU in the common zone above which two masks show one object
INSIDE = 0.5  # part of a mask inside another, above which the better one counts
BRANCH = 0.9  # part of a cut mask inside another in the zone: one of several branches of that object
MARGIN = 0.02  # of the tile's side: an object so near to a border may go on behind it


@dataclass(frozen=True)
class Found:
    """Detections of all tiles of an image, in the order of the tiles.

    Attributes:
        tiles: (N,) int64, position of each detection's tile.
        boxes: (N, 4) float32 ``xyxy`` in pixels of the image.
        scores, labels: (N,) float32 and int64.
        rles: masks as RLE of the whole image; those of the boxes for a model without masks.
        areas: (N,) int64, their pixels.
        cut: (N,) bool, whether a detection reaches a border of its tile inside the image.
    """

    tiles: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    rles: list[Any]
    areas: np.ndarray
    cut: np.ndarray


class TiledDetector:
    """Detect objects in the tiles of ``TEST.TILES``, and merge them; see :func:`merge`.

    Args:
        detector: finds objects in a tile, whose masks are probabilities inside the boxes until they are
            pasted.
        cfg: whole config.
    """

    def __init__(self, detector: Detector, cfg: Config) -> None:
        self.detector, self.cfg = detector, cfg

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        original_sizes: Sequence[tuple[int, int]] | None = None,
        paste: bool = True,
    ) -> list[Detections]:
        """Return the detections of each image on the CPU, best first; masks are :class:`RleMasks`.

        Args:
            images: (3, H, W) uint8 in the pixels of the file, in ``INPUT.FORMAT`` order.
            original_sizes: those of ``images``.
            paste: has no effect.
        """
        return [self._detect_one(image) for image in images]

    def _detect_one(self, image: Tensor) -> Detections:
        size, tiles = image_size(image), self.cfg.test.tiles
        windows = tile_windows(*size, tiles.size, tiles.overlap)
        parts, rles, areas, with_masks = [], [], [], False
        for window, found in zip(windows, self._in_windows(image, windows), strict=True):
            for rle, area in _encode(found, window, size):
                rles.append(rle)
                areas.append(area)
            with_masks |= found.masks is not None
            parts.append(replace(found, masks=None))  # the probabilities of all tiles are hundreds of MB
        counts = [len(part) for part in parts]
        tile_of = np.repeat(np.arange(len(parts)), counts)
        boxes = torch.cat([part.boxes for part in parts]).float().numpy() + windows[tile_of][:, [0, 1, 0, 1]]
        merged = merge(
            Found(
                tile_of,
                boxes.astype(np.float32),
                torch.cat([part.scores for part in parts]).float().numpy(),
                torch.cat([part.labels for part in parts]).numpy(),
                rles,
                np.array(areas, dtype=np.int64),
                _is_cut(boxes, windows[tile_of], size, MARGIN * tiles.size),
            ),
            windows,
            size,
        )
        return merged if with_masks else replace(merged, masks=None)

    def _in_windows(self, image: Tensor, windows: np.ndarray) -> Iterator[Detections]:
        """Yield the detections in each tile, in its pixels, on the CPU."""
        test, given = self.cfg.test, self.cfg.input
        for begin in range(0, len(windows), test.ims_per_batch):
            batch, sizes = [], []
            for left, top, right, bottom in windows[begin : begin + test.ims_per_batch].tolist():
                pixels = np.ascontiguousarray(image[:, top:bottom, left:right].permute(1, 2, 0).cpu())
                sizes.append((bottom - top, right - left))
                resized = shortest_edge_size(*sizes[-1], given.min_size_test, given.max_size_test)
                batch.append(to_tensor(resize_pixels(pixels, *resized), "RGB"))  # keeps the order
            for found in self.detector.detect(batch, sizes, paste=False):
                yield found.to("cpu")


def in_tiles(detector: Detector, cfg: Config) -> Detector:
    """Return the detector, or with ``TEST.TILES`` one that gives it tiles."""
    return TiledDetector(detector, cfg) if cfg.test.tiles.size else detector


def _encode(found: Detections, window: np.ndarray, size: tuple[int, int]) -> Iterator[tuple[Any, int]]:
    """Yield RLE and number of pixels of each mask of a tile, in the image of ``size``; see :class:`Found`."""
    left, top, right, bottom = window.tolist()
    if isinstance(found.masks, Tensor):
        parts = mask_parts(found.masks, found.boxes, (bottom - top, right - left))
    else:
        parts = map(_filled, found.boxes.tolist())
    for row, column, part in parts:
        yield encode_part(part.numpy(), top + row, left + column, size), int(part.sum())


def _filled(box: list[float]) -> tuple[int, int, Tensor]:
    """Return first row and column of the pixels that a box touches, and a mask with all of them."""
    x0, y0, x1, y1 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    return y0, x0, torch.ones(y1 - y0, x1 - x0, dtype=torch.bool)


def _is_cut(boxes: np.ndarray, windows: np.ndarray, size: tuple[int, int], margin: float) -> np.ndarray:
    """Return (N,) whether boxes (N, 4) come near to a border of their tiles (N, 4) inside the image."""
    height, width = size
    inner = np.concatenate([windows[:, :2] > 0, windows[:, 2:] < (width, height)], axis=1)
    near: np.ndarray = ((np.abs(boxes - windows) <= max(1.0, margin)) & inner).any(axis=1)
    return near


def merge(found: Found, windows: np.ndarray, size: tuple[int, int]) -> Detections:
    """Make one detection of all that show the same object.

    Detections of one class in two tiles are compared by the part of their masks in the zone that both tiles
    see. In this order:

    1. A detection is dropped if another tile shows its box with more room to the borders, and has the same
       object: a mask with an IoU above :data:`AGREE` in the zone; or one with as high a score, if more than
       :data:`INSIDE` of one of the two masks lies in the other.
    2. Others of which at least one is cut are joined if they agree in the zone, and each is the best partner
       of the other among those of its tile; or if both are cut, and :data:`BRANCH` of one without a partner
       lies in the other, as with a U of which a tile shows two arms.

    Joined ones have the union of their masks, the box around their boxes, and the highest score, also of
    those that were dropped for them. Detections of one tile are never compared: NMS has done that.

    Args:
        found: detections of all tiles.
        windows: (T, 4) see :func:`tile_windows`.
        size: (height, width) of the image.

    Returns:
        Detections, best first, with :class:`RleMasks`.
    """
    pairs = _pairs(found, windows, size)
    scores, dropped = found.scores.copy(), np.zeros(len(found.scores), dtype=bool)
    partners: dict[int, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        partners[pair.one].append(pair)
        partners[pair.other].append(pair)

    own, best = _rooms(found.boxes, windows, found.tiles, size)
    for row in np.argsort(own, kind="stable").tolist():
        witnesses = [
            pair
            for pair in partners[row]
            if found.tiles[other := pair.partner_of(row)] == best[row]
            and not dropped[other]
            and (pair.agreement > AGREE or (_is_inside(found, pair) and scores[other] >= scores[row]))
        ]
        if best[row] != found.tiles[row] and witnesses:
            dropped[row] = True
            other = max(witnesses, key=lambda pair: pair.agreement).partner_of(row)
            scores[other] = max(scores[other], scores[row])

    group = list(range(len(scores)))

    def root(row: int) -> int:
        while group[row] != row:
            group[row] = row = group[group[row]]
        return row

    for pair in _joints(found, [p for p in pairs if not (dropped[p.one] or dropped[p.other])]):
        group[root(pair.other)] = root(pair.one)
    members: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(~dropped).tolist():
        members[root(row)].append(row)
    ordered = sorted(members.values(), key=lambda rows: -scores[rows].max())
    boxes = [np.append(found.boxes[r, :2].min(axis=0), found.boxes[r, 2:].max(axis=0)) for r in ordered]
    rles = [[found.rles[row] for row in rows] for rows in ordered]
    counts = [(coco_mask.merge(parts) if len(parts) > 1 else parts[0])["counts"] for parts in rles]
    return Detections(
        torch.from_numpy(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        torch.tensor([scores[rows].max() for rows in ordered], dtype=torch.float32),
        torch.tensor([found.labels[rows[0]] for rows in ordered], dtype=torch.int64),
        RleMasks(counts, size),
    )


def _rooms(
    boxes: np.ndarray, windows: np.ndarray, tiles: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) the room of boxes (N, 4) in their own tile, and (N,) the tile with the most room.

    The room is the distance to the nearest border that lies inside the image; below 0 where a tile does not
    hold the box. Of several with as much it is the first one.
    """
    far = float(sum(size))
    edges = windows.astype(np.float64)
    edges[:, :2][windows[:, :2] == 0] = -far
    edges[:, 2:][windows[:, 2:] == (size[1], size[0])] = far
    rows = np.arange(len(boxes))
    own, best = np.zeros(len(boxes)), np.zeros(len(boxes), dtype=np.int64)
    for begin in range(0, len(boxes), 1000):
        part = slice(begin, begin + 1000)
        low, high = boxes[part, None, :2] - edges[:, :2], edges[:, 2:] - boxes[part, None, 2:]
        room = np.minimum(low, high).min(axis=2)
        own[part] = room[rows[: len(room)], tiles[part]]
        best[part] = room.argmax(axis=1)
    return own, best


def _is_inside(found: Found, pair: _Pair) -> bool:
    return pair.common > INSIDE * min(found.areas[pair.one], found.areas[pair.other])


@dataclass(frozen=True)
class _Pair:
    """Two detections of one class in two tiles whose masks overlap, by their rows.

    Attributes:
        common: pixels of both masks.
        zone_one, zone_other: pixels of each mask in the zone that both tiles see.
    """

    one: int
    other: int
    common: int
    zone_one: int
    zone_other: int

    def partner_of(self, row: int) -> int:
        """Return the other detection of the pair."""
        return self.other if row == self.one else self.one

    @property
    def agreement(self) -> float:
        """Return the IoU in the zone."""
        return self.common / (self.zone_one + self.zone_other - self.common)


def _pairs(found: Found, windows: np.ndarray, size: tuple[int, int]) -> list[_Pair]:
    first = np.searchsorted(found.tiles, np.arange(len(windows) + 1))
    rows_of = [np.arange(begin, end) for begin, end in pairwise(first.tolist())]
    pairs: list[_Pair] = []
    for one, window in enumerate(windows):
        low, high = np.maximum(window[:2], windows[:, :2]), np.minimum(window[2:], windows[:, 2:])
        for other in np.flatnonzero((low < high).all(axis=1)).tolist():
            if other > one:
                zone = np.concatenate([low[other], high[other]])
                pairs += _pairs_of(found, rows_of[one], rows_of[other], zone, size)
    return pairs


def _pairs_of(
    found: Found, ones: np.ndarray, others: np.ndarray, zone: np.ndarray, size: tuple[int, int]
) -> Iterator[_Pair]:
    """Yield the pairs of the detections of two tiles with a common ``zone``, (4,) ``xyxy``."""
    ones, others = _reaching(found, ones, zone), _reaching(found, others, zone)
    if not len(ones) or not len(others):
        return
    left, top, right, bottom = zone.tolist()
    rectangle = coco_mask.frPyObjects(np.array([[left, top, right - left, bottom - top]], dtype=float), *size)
    zone_ones, zone_others = (_common(found, rows, rectangle)[:, 0].tolist() for rows in (ones, others))
    common = _common(found, ones, [found.rles[row] for row in others])
    common[found.labels[ones][:, None] != found.labels[others]] = 0
    for i, j in np.argwhere(common > 0).tolist():
        yield _Pair(int(ones[i]), int(others[j]), int(common[i, j]), zone_ones[i], zone_others[j])


def _reaching(found: Found, rows: np.ndarray, zone: np.ndarray) -> np.ndarray:
    """Return the rows of the detections that have pixels and may have some in a zone."""
    boxes = found.boxes[rows]  # a mask may go beyond its box by a pixel
    near = ((boxes[:, 2:] > zone[:2] - 1) & (boxes[:, :2] < zone[2:] + 1)).all(axis=1)
    return rows[near & (found.areas[rows] > 0)]


def _common(found: Found, rows: np.ndarray, others: list[Any]) -> np.ndarray:
    """Return (R, O) int64, the common pixels of the masks of some detections and of others.

    With a crowd on the right side pycocotools returns not the IoU but the part of the left side.
    """
    shares = coco_mask.iou([found.rles[row] for row in rows], others, [1] * len(others))
    pixels: np.ndarray = np.rint(shares * found.areas[rows][:, None]).astype(np.int64)
    return pixels


def _joints(found: Found, pairs: list[_Pair]) -> Iterator[_Pair]:
    """Yield the pairs that are parts of one object, see step 2 of :func:`merge`."""
    pairs = [pair for pair in pairs if found.cut[pair.one] or found.cut[pair.other]]
    best: dict[tuple[int, int], _Pair] = {}  # by detection and tile of the partner
    for pair in sorted(pairs, key=lambda pair: -pair.agreement):
        if pair.agreement > AGREE:
            for row in (pair.one, pair.other):
                best.setdefault((row, int(found.tiles[pair.partner_of(row)])), pair)

    def partner(row: int, pair: _Pair) -> _Pair | None:
        return best.get((row, int(found.tiles[pair.partner_of(row)])))

    for pair in pairs:
        if partner(pair.one, pair) is pair is partner(pair.other, pair):
            yield pair
        elif found.cut[pair.one] and found.cut[pair.other]:
            alone = [(pair.one, pair.zone_one), (pair.other, pair.zone_other)]
            if any(partner(row, pair) is None and pair.common >= BRANCH * pixels for row, pixels in alone):
                yield pair
