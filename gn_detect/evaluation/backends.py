"""Run the COCO evaluators: pycocotools is the reference, the others are faster and give the same numbers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .coco_data import Json

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


def precision_and_recall(
    ground_truth: Json, detections: Iterable[Json], iou_type: str, backend: str
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate at COCO's 10 IoU thresholds, 4 ranges of area and at most 1, 10 or 100 detections per image.

    Args:
        ground_truth, detections: as :mod:`.coco_data` prepares them; evaluators may add keys to them.
        iou_type: ``"bbox"`` or ``"segm"``.
        backend: one of :data:`BACKENDS`.

    Returns:
        Precision (10, 101, K, 4, 3) at 101 recalls and recall (10, K, 4, 3); -1 without any object to find.
        K are the categories in order of their ids.

    Raises:
        UserError: the backend refuses a mask that is not valid RLE.
    """
    # Names do not matter here, and hotcoco refuses some.
    numbered = [{"id": c["id"], "name": str(c["id"])} for c in ground_truth["categories"]]
    ground_truth = {**ground_truth, "categories": numbered}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = _make(backend, ground_truth, detections, iou_type)
            evaluator.evaluate()
            evaluator.accumulate()
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                "bad-rle", f"{backend} cannot evaluate these masks: {reason}; encode them again"
            ) from error
    return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])


def _make(backend: str, ground_truth: Json, detections: Iterable[Json], iou_type: str) -> Any:
    if backend == "hotcoco":
        module = importlib.import_module("hotcoco")
        found = _load_from_disk(module, ground_truth, detections)
        return module.COCOeval(module.COCO(ground_truth), found, iou_type)
    given = {**ground_truth, "annotations": list(detections)}
    if backend == "faster_coco_eval":
        module = importlib.import_module("faster_coco_eval")
        truth, found = module.COCO(ground_truth), module.COCO(given)
        return module.COCOeval_faster(truth, found, iou_type, print_function=lambda *_: None)
    coco = importlib.import_module("pycocotools.coco").COCO
    truth, found = coco(), coco()
    for data, index in ((ground_truth, truth), (given, found)):
        index.dataset = data
        index.createIndex()
    return importlib.import_module("pycocotools.cocoeval").COCOeval(truth, found, iou_type)


def _load_from_disk(hotcoco: Any, ground_truth: Json, detections: Iterable[Json]) -> Any:
    """Let hotcoco read a file: it takes a fifth of the memory that Python objects would."""
    with tempfile.TemporaryDirectory(prefix="gn_detect-") as folder:
        path = Path(folder) / "detections.json"
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(json.dumps(ground_truth | {"annotations": []}).removesuffix("]}"))
                for number, detection in enumerate(detections):
                    file.write(("," if number else "") + json.dumps(detection) + "\n")
                file.write("]}")
        except OSError as error:
            raise UserError(
                "cannot-write",
                f"cannot write detections to {folder}: {error.strerror}; set TMPDIR to a folder with room",
            ) from error
        return hotcoco.COCO(str(path))
