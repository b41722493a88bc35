"""Run the COCO evaluators: pycocotools is the reference, the others are faster and give the same numbers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UserError
from .coco_data import GroundTruth, Json
from .detections import DetectionTable

BACKENDS = ("hotcoco", "faster_coco_eval", "pycocotools")  # fastest first

# Oldest versions shown to equal pycocotools; early ones of hotcoco gave other numbers without a warning.
_PROVEN_FROM = {"hotcoco": (1, 3), "faster_coco_eval": (1, 8)}


def choose_backend(name: str | None) -> str:
    """Return the evaluator to use: the named one; for None and ``"auto"`` the fastest installed proven one.

    Raises:
        UserError: it is unknown or not installed.
    """
    if name in (None, "auto"):
        return next(backend for backend in BACKENDS if _is_proven(backend))
    if name not in BACKENDS:
        raise UserError(
            "bad-value", f"TEST.COCO_EVAL_BACKEND: {name!r} is not one of auto, {', '.join(BACKENDS)}"
        )
    try:
        importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise UserError(
            "missing-package",
            f"TEST.COCO_EVAL_BACKEND: {name} is not installed; pip install {package}, or choose auto",
        ) from error
    return name


def _is_proven(backend: str) -> bool:
    if backend not in _PROVEN_FROM:
        return True
    try:
        importlib.import_module(backend)
        version = importlib.metadata.version(backend.replace("_", "-"))
        return tuple(int(part) for part in version.split(".")[:2]) >= _PROVEN_FROM[backend]
    except (ImportError, ValueError):
        return False


class Evaluators:
    """The evaluators of one backend for one dataset. They share what they can of its boxes and masks."""

    def __init__(self, truth: GroundTruth, detections: DetectionTable, backend: str) -> None:
        """Load nothing yet.

        Args:
            truth: the ground truth, with masks if masks are evaluated.
            detections: of the same IoU types. With hotcoco they are not kept, as their masks are large.
            backend: one of :data:`BACKENDS`.
        """
        self._truth, self._detections, self._backend = truth, detections, backend
        self._loaded: dict[bool, Any] = {}  # hotcoco's ground truth, by whether it is all of it
        self._found: Any = None  # hotcoco's detections

    def precision_and_recall(self, iou_type: str, categories: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate at COCO's 10 IoU thresholds, 4 ranges of area and at most 1, 10 and 100 detections.

        Args:
            iou_type: ``"bbox"`` or ``"segm"``.
            categories: K numbers of the ground truth's, ascending.

        Returns:
            Precision (10, 101, K, 4, 3) at 101 recalls and recall (10, K, 4, 3); -1 without any object to
            find.

        Raises:
            UserError: the backend refuses a mask that is not valid RLE.
        """
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                evaluator = (
                    self._by_hotcoco(iou_type) if self._backend == "hotcoco" else self._other(iou_type)
                )
                evaluator.params.catIds = list(categories)
                evaluator.evaluate()
                evaluator.accumulate()
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    "bad-rle", f"{self._backend} cannot evaluate these masks: {reason}; encode them again"
                ) from error
        return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])

    def _ground_truth(self, iou_type: str) -> Json:
        # Names do not matter here, and hotcoco refuses some.
        coco = self._truth.coco
        numbered = [{"id": c["id"], "name": str(c["id"])} for c in coco["categories"]]
        return {
            "images": coco["images"],
            "categories": numbered,
            "annotations": self._truth.annotations(iou_type),
        }

    def _by_hotcoco(self, iou_type: str) -> Any:
        hotcoco = importlib.import_module("hotcoco")
        entire = iou_type == "bbox" or not self._truth.maskless
        if entire not in self._loaded:
            self._loaded[entire] = hotcoco.COCO(self._ground_truth(iou_type))
        table, known = self._detections, self._loaded[entire]
        if self._found is None:
            columns = [table.images, *table.boxes.T, table.scores, table.categories]
            rows = np.stack(columns, axis=1).astype(np.float64)
            self._found = known.load_res(rows, segmentation=table.masks() if table.counts else None)
            self._detections = table = replace(table, counts=[])  # hotcoco has a copy
        self._found.update_anns(ids=np.arange(1, len(table) + 1), area=table.areas[iou_type])
        return hotcoco.COCOeval(known, self._found, iou_type)

    def _other(self, iou_type: str) -> Any:
        known, table = self._ground_truth(iou_type), self._detections
        given = {**known, "annotations": [table.entry(row, iou_type) for row in range(len(table))]}
        if self._backend == "faster_coco_eval":
            module = importlib.import_module("faster_coco_eval")
            truth, found = module.COCO(known), module.COCO(given)
            return module.COCOeval_faster(truth, found, iou_type, print_function=lambda *_: None)
        coco = importlib.import_module("pycocotools.coco").COCO
        truth, found = coco(), coco()
        for data, index in ((known, truth), (given, found)):
            index.dataset = data
            index.createIndex()
        return importlib.import_module("pycocotools.cocoeval").COCOeval(truth, found, iou_type)
