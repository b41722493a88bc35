"""Tiles of large images: where they lie, and the samples that training takes from them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pycocotools.mask as coco_mask

from .coco.dataset import CocoDataset
from .coco.rle import RleMask
from .coco.tables import ImageRecord, ImageTable
from .transforms import LabelledImage, Mask, crop

if TYPE_CHECKING:
    from ..config.schema import TrainTiles


def tile_windows(height: int, width: int, side: int, overlap: float) -> np.ndarray:
    """Return the tiles of an image, row by row.

    They are spread evenly, so neighbours share ``overlap * side`` pixels or a few more. All have one shape:
    ``side``, or the image's own size where it is smaller.

    Args:
        height, width: size of the image in pixels.
        side: of a tile, pixels.
        overlap: part of the side that neighbours share at least, from 0 to 0.9.

    Returns:
        (T, 4) int64: left, top, right and bottom, the last two exclusive.
    """
    return np.array(
        [
            (left, top, min(left + side, width), min(top + side, height))
            for top in _starts(height, side, overlap)
            for left in _starts(width, side, overlap)
        ],
        dtype=np.int64,
    )


def _starts(length: int, side: int, overlap: float) -> list[int]:
    rest, step = max(length - side, 0), max(side - int(np.ceil(side * overlap)), 1)
    count = -(-rest // step)
    return [rest * i // max(count, 1) for i in range(count + 1)]


class TiledDataset:
    """The tiles of a dataset's images, each an image of its own to train on.

    A tile has the objects whose mask (without masks, box) it shows for the most part, see
    ``DATALOADER.TILES.MIN_VISIBLE``. Crowds are no objects in any tile, as in whole images.

    Args:
        dataset: whole images.
        tiles: size, overlap and the least visible part.

    Attributes:
        name, annotations_path, num_crowds: of ``dataset``.
        images: file, id and, in place of the image's, the size of each tile.
        windows: (T, 4) int64, see :func:`tile_windows`.
    """

    def __init__(self, dataset: CocoDataset, tiles: TrainTiles) -> None:
        self.dataset, self.side = dataset, tiles.size
        self.name, self.annotations_path = dataset.name, dataset.annotations_path
        self.num_crowds = dataset.num_crowds
        records, windows, rows, image_of = [], [], [], []
        for index, record in enumerate(dataset.images):
            found = tile_windows(record.height, record.width, tiles.size, tiles.overlap)
            visible = visible_shares(dataset, index, found) >= tiles.min_visible
            for window, kept in zip(found.tolist(), visible.T, strict=True):
                left, top, right, bottom = window
                records.append(ImageRecord(record.id, record.file_name, bottom - top, right - left))
                windows.append(window)
                rows.append(np.flatnonzero(kept))
                image_of.append(index)
        self.images = ImageTable(records)
        self.windows = np.array(windows, dtype=np.int64).reshape(-1, 4)
        self._image_of = np.array(image_of, dtype=np.int64)
        self._counts = np.array([len(kept) for kept in rows], dtype=np.int64)
        self._first = np.cumsum([0, *self._counts])
        self._rows = np.concatenate([np.empty(0, dtype=np.int64), *rows])

    def __len__(self) -> int:
        return len(self.windows)

    def __repr__(self) -> str:
        return f"{self.dataset!r} in {len(self)} tiles of {self.side} pixels"

    def counts(self) -> np.ndarray:
        """Return (T,), the number of objects in each tile."""
        return self._counts

    def labels(self, index: int) -> np.ndarray:
        """Return (N,) int64, the contiguous labels of the objects in a tile."""
        return self.dataset.labels(int(self._image_of[index]))[self._kept(index)]

    def read(self, index: int) -> LabelledImage:
        """Return a tile as RGB with its objects; the whole image is read for it.

        Raises:
            UserError: see :meth:`CocoDataset.read`.
        """
        whole = self.dataset.read(int(self._image_of[index]))
        keep = np.zeros(len(whole), dtype=bool)
        keep[self._kept(index)] = True
        left, top, right, bottom = self.windows[index].tolist()
        return crop(whole.select(keep), left, top, bottom - top, right - left)

    def _kept(self, index: int) -> np.ndarray:
        """Return the positions of a tile's objects among those of its image."""
        return self._rows[self._first[index] : self._first[index + 1]]


def visible_shares(dataset: CocoDataset, index: int, windows: np.ndarray) -> np.ndarray:
    """Return (N, T) from 0 to 1, the part of each object of an image that each window shows.

    It is the part of the mask's pixels, or without masks of the box.
    """
    record = dataset.images[index]
    labelled = dataset.label(index, np.empty((record.height, record.width, 0), dtype=np.uint8))
    bounds = labelled.boxes
    if labelled.masks is not None:
        bounds = np.array([_bounds(mask) for mask in labelled.masks]).reshape(-1, 4)
    bounds = bounds.clip(0, [record.width, record.height] * 2)
    common = np.minimum(bounds[:, None, 2:], windows[:, 2:]) - np.maximum(bounds[:, None, :2], windows[:, :2])
    sides = (bounds[:, 2:] - bounds[:, :2])[:, None]
    shares: np.ndarray = (common.clip(0) / np.maximum(sides, 1e-9)).prod(axis=2)
    if labelled.masks is None:
        return shares
    whole = (common >= sides).all(axis=2)
    shares[whole] = 1.0
    crossed = (shares > 0) & ~whole
    rectangles = _encoded_windows(record.height, record.width, windows.tobytes())
    for row in np.flatnonzero(crossed.any(axis=1)).tolist():
        columns = np.flatnonzero(crossed[row]).tolist()
        mask = _encode(labelled.masks[row], record.height, record.width)
        # With a crowd on the right side it is not the IoU but the part of the left side.
        found = coco_mask.iou([mask], [rectangles[i] for i in columns], [1] * len(columns))
        shares[row, columns] = np.nan_to_num(found[0])
    return shares


def _bounds(mask: Mask) -> np.ndarray:
    """Return (4,) ``xyxy`` around the pixels of a mask; around those of polygons with a pixel to spare."""
    if isinstance(mask, list):
        points = np.concatenate(mask).reshape(-1, 2)
        return np.concatenate([np.floor(points.min(axis=0)) - 1, np.ceil(points.max(axis=0)) + 1])
    assert isinstance(mask, RleMask)
    left, top, width, height = coco_mask.toBbox(_encode(mask, mask.height, mask.width))
    return np.array([left, top, left + width, top + height])


def _encode(mask: Mask, height: int, width: int) -> Any:
    if isinstance(mask, list):
        return coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in mask], height, width))
    assert isinstance(mask, RleMask)
    return {"size": [height, width], "counts": mask.counts}


@lru_cache(maxsize=1)  # most images of a dataset have one size
def _encoded_windows(height: int, width: int, windows: bytes) -> list[Any]:
    boxes = np.frombuffer(windows, dtype=np.int64).reshape(-1, 4).astype(np.float64)
    sized = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    found: list[Any] = coco_mask.frPyObjects(sized, height, width)
    return found
