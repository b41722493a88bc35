"""Average precision under resampling of images: each image counts as often as it was drawn.

Detections are matched once. An image drawn twice counts twice, with its detections, objects and crowds. The
average precision of a resample follows from the ranked matches and the numbers of draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RECALLS = np.linspace(0, 1, 101)
_ENTRIES = 1 << 18  # resamples times detections at once: a few such arrays fit into a processor's cache


@dataclass(frozen=True)
class Ranked:
    """The matches of one category in one range of areas, in order of descending scores.

    Attributes:
        images: (D,) int64, positions of the detections' images.
        hits: (T, D) bool, matched with an object, at each of T IoU thresholds.
        ignored: (T, D) bool, neither true nor false positives: matched with a crowd or an object out of the
            range, or unmatched and themselves out of the range.
        objects: (I,) int64, number of objects to find in each image.
    """

    images: np.ndarray
    hits: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


def draw_images(images: int, count: int, seed: int = 0) -> np.ndarray:
    """Return (count, images) int32: how often each of ``count`` resamples of a bootstrap has each image."""
    random = np.random.default_rng(seed)
    return random.multinomial(images, np.full(images, 1 / max(images, 1)), count).astype(np.int32)


def average_precision(ranked: Ranked, draws: np.ndarray) -> np.ndarray:
    """Return (R, T) float64 in [0, 1], COCO's average precision of resamples; nan without an object to find.

    Args:
        ranked: matches of one category.
        draws: (R, I) int32, see :func:`draw_images`. Ones give that of the images themselves.
    """
    total = draws @ ranked.objects
    found = np.zeros((len(draws), len(ranked.hits)))
    true = ranked.hits & ~ranked.ignored
    end = int(np.flatnonzero(true.any(axis=0)).max(initial=-1)) + 1  # the rest changes no precision at a hit
    step = max(1, _ENTRIES // max(end, 1))
    for first in range(0, len(draws) if end else 0, step):
        part = slice(first, first + step)
        weights = draws[part][:, ranked.images[:end]]
        found[part] = _precision(weights, true[:, :end], ranked.ignored[:, :end], total[part])
    found[total == 0] = np.nan
    return found


def _precision(weights: np.ndarray, true: np.ndarray, ignored: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return (R, T) for weights (R, D) of detections that end with a true positive."""
    found = np.zeros((len(weights), len(true)))
    counted = np.cumsum(weights * ~ignored[0], axis=1, dtype=np.int32)
    for threshold, hits in enumerate(true):
        places = np.flatnonzero(hits)
        if not len(places):
            continue
        positives = counted[:, places]
        changed = np.flatnonzero(ignored[threshold] != ignored[0])
        if len(changed):
            signs = np.where(ignored[0, changed], 1, -1).astype(np.int32)
            steps = np.cumsum(weights[:, changed] * signs, axis=1, dtype=np.int32)
            steps = np.concatenate([np.zeros((len(steps), 1), dtype=np.int32), steps], axis=1)
            positives += steps[:, np.searchsorted(changed, places, side="right")]
        right = np.cumsum(weights[:, places], axis=1, dtype=np.int32)
        precision = right / np.maximum(positives, 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = _reached(right / np.maximum(total, 1)[:, None])
        found[:, threshold] = (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(_RECALLS)
    return found


def _reached(recall: np.ndarray) -> np.ndarray:
    """Return how many of COCO's 101 recalls are at most ``recall``, to the last bit of their numbers."""
    near = np.minimum((recall * 100).astype(np.int64), 99)
    return near + (_RECALLS[near] <= recall) + (_RECALLS[near + 1] <= recall)


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of the values of resamples; nan where all are nan."""
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def only_matches(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what :func:`rank` needs of an image in ``evalImgs`` of pycocotools or hotcoco, as arrays."""
    count = len(entry["dtScores"])
    return {
        "scores": np.asarray(entry["dtScores"], dtype=np.float64),
        "hits": (np.asarray(entry["dtMatches"]) > 0).reshape(-1, count) if count else None,
        "ignored": np.asarray(entry["dtIgnore"]).astype(bool).reshape(-1, count) if count else None,
        "objects": len(entry["gtIgnore"]) - int(np.count_nonzero(entry["gtIgnore"])),
    }


def rank(entries: Sequence[tuple[int, dict[str, Any]]], images: int, thresholds: int) -> Ranked:
    """Return the ranked matches of one category.

    Args:
        entries: positions of images, ascending, with :func:`only_matches`.
        images: number of all images.
        thresholds: number of IoU thresholds.
    """
    objects = np.zeros(images, dtype=np.int64)
    for place, entry in entries:
        objects[place] = entry["objects"]
    found = [(place, entry) for place, entry in entries if len(entry["scores"])]
    none = np.empty((thresholds, 0), dtype=bool)
    scores = np.concatenate([np.empty(0), *(entry["scores"] for _, entry in found)])
    places = [np.full(len(entry["scores"]), place) for place, entry in found]
    order = np.argsort(-scores, kind="mergesort")  # as pycocotools sorts equal scores
    return Ranked(
        np.concatenate([np.empty(0, dtype=np.int64), *places])[order],
        np.concatenate([none, *(entry["hits"] for _, entry in found)], axis=1)[:, order],
        np.concatenate([none, *(entry["ignored"] for _, entry in found)], axis=1)[:, order],
        objects,
    )
