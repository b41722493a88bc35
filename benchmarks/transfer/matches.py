"""The matches of one run's detections: small enough to commit, and enough to compute AP on any resample.

COCO's AP is not a mean over images, so an interval over images needs the detections. For each image a record
keeps the scores of the detections, and for each of COCO's ten IoU thresholds whether a detection is a true
positive.
"""

from __future__ import annotations

import base64
import contextlib
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

RECALLS = np.linspace(0.0, 1.0, 101)
THRESHOLDS = 10  # IoU of 0.5, 0.55, ..., 0.95
SCORE = 65535  # scores are stored in 16 bits


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections of one run, all images together, in descending order of score.

    Attributes:
        image: (D,) position of each detection's image.
        score: (D,) in units of 1 / 65535.
        hits: (D, 10) whether it is a true positive at each threshold.
    """

    image: np.ndarray
    score: np.ndarray
    hits: np.ndarray

    @classmethod
    def of(cls, image: np.ndarray, score: np.ndarray, hits: np.ndarray) -> Matches:
        """Sort as pycocotools does: equal scores stay in the order of the images."""
        order = np.argsort(-score.astype(np.int64), kind="stable")
        return cls(image[order], score[order], hits[order])

    def average_precision(self, objects: np.ndarray, weights: np.ndarray | None = None) -> float:
        """Return COCO's AP in percent, for one category without crowds.

        Args:
            objects: (I,) objects in each image.
            weights: (I,) how often each image is counted; by default once.
        """
        weights = np.ones(len(objects)) if weights is None else weights
        total = float(weights @ objects)
        if not total:
            return float("nan")
        each = weights[self.image][:, None]
        true, count = (each * self.hits).cumsum(0), each.cumsum(0)
        recall = true / total
        precision = true / np.maximum(count, 1e-12)
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        found = 0.0
        for t in range(THRESHOLDS):
            place = np.searchsorted(recall[:, t], RECALLS - 1e-12, side="left")
            inside = place < len(precision)
            found += precision[place[inside], t].sum()
        return 100 * found / (THRESHOLDS * len(RECALLS))

    def to_text(self) -> str:
        """Return the detections, image by image, as base64 of compressed numbers."""
        order = np.argsort(self.image, kind="stable")
        bits = (self.hits.astype(np.uint16) << np.arange(THRESHOLDS, dtype=np.uint16)).sum(1)
        columns = np.stack([column[order].astype("<u2") for column in (self.image, self.score, bits)])
        planes = columns.view(np.uint8).reshape(3, -1, 2).transpose(0, 2, 1)  # like bytes compress together
        return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> Matches:
        """Undo :meth:`to_text`."""
        planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8).reshape(3, 2, -1)
        columns = np.ascontiguousarray(planes.transpose(0, 2, 1)).view("<u2").reshape(3, -1)
        image, score, bits = columns.astype(np.int64)
        return cls.of(image, score, (bits[:, None] >> np.arange(THRESHOLDS) & 1).astype(bool))


def match(truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> Matches:
    """Match the masks of ``detections``, entries of a COCO result file, with pycocotools.

    Args:
        truth: COCO ground truth of one category without crowds; the order of its images is that of the
            result.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dict(truth)
        coco.createIndex()
        # loadRes writes into what it is given, and refuses an empty list.
        found = coco.loadRes([dict(entry) for entry in detections]) if detections else COCO()
        evaluator = COCOeval(coco, found, "segm")
        evaluator.params.imgIds = [image["id"] for image in truth["images"]]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [100]
        if not detections:
            evaluator.cocoDt.dataset = {"images": truth["images"], "annotations": []}
            evaluator.cocoDt.createIndex()
        evaluator.evaluate()
    images, scores, hits = [], [], []
    # pycocotools sorts the ids of the images.
    position = {image["id"]: number for number, image in enumerate(truth["images"])}
    for entry in evaluator.evalImgs:
        if entry is not None:
            images += [position[entry["image_id"]]] * len(entry["dtScores"])
            scores += [round(score * SCORE) for score in entry["dtScores"]]
            hits.append(np.asarray(entry["dtMatches"]).T > 0)
    if not images:
        return Matches(np.zeros(0, int), np.zeros(0, int), np.zeros((0, THRESHOLDS), bool))
    return Matches.of(np.array(images), np.array(scores), np.concatenate(hits))


def count_objects(truth: Mapping[str, Any]) -> np.ndarray:
    """Return the number of objects in each image of ``truth["images"]``, (I,)."""
    counts = {image["id"]: 0 for image in truth["images"]}
    for annotation in truth["annotations"]:
        counts[annotation["image_id"]] += 1
    return np.array(list(counts.values()))
