"""Run a model on a dataset, write its detections in COCO's format, and evaluate them."""

from __future__ import annotations

import logging
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from ..data import CocoDataset
from ..distributed.group import from_main, is_main, world_size
from ..errors import UserError
from ..files import atomic_write
from ..modeling import MaskRCNN
from ..modeling.inputs import send_ahead
from ..ops import paste_one_by_one
from ..progress import progress_bar
from ..structures import Detections, RleMasks, Sample
from ..text import Lines
from .backends import choose_backend
from .coco import IOU_TYPES, evaluate_and_diagnose
from .results_file import ResultsWriter, entry_text, gather_text
from .table import format_errors, format_results

logger = logging.getLogger(__name__)

RESULTS_FILE = "coco_instances_results.json"

# The remedy if the memory of a GPU is too small for detection.
LESS_MEMORY = (
    "lower INPUT.MAX_SIZE_TEST and INPUT.MIN_SIZE_TEST (with TEST.AUG its MAX_SIZE), or "
    "TEST.DETECTIONS_PER_IMAGE, or use MODEL.DEVICE cpu"
)
_MOVED_BYTES = 1 << 28  # masks that are moved from an accelerator to the CPU at once

DIAGNOSIS = "diagnosis"

Outcome = dict[str, dict[str, Any]]


class Interrupted(Exception):
    """A signal ended an evaluation."""


class Detector(Protocol):
    """Anything that detects objects as :class:`gn_detect.modeling.MaskRCNN` does."""

    def detect(
        self,
        images: Sequence[Tensor],
        original_sizes: Sequence[tuple[int, int]] | None = None,
        paste: bool = True,
    ) -> list[Detections]:
        """See :meth:`gn_detect.modeling.MaskRCNN.detect`."""


class Stop(Protocol):
    """A request to stop, such as :class:`gn_detect.engine.interruption.Interruption`."""

    def seen(self) -> bool:
        """Return whether this process knows of a request to any process."""

    def requested(self) -> int:
        """Return whether there was a request to any process. All processes call this together."""

    def at_once(self) -> AbstractContextManager[None]:
        """Let a request end the block with Interrupted."""


def detections_to_coco(
    detections: Detections,
    image_id: int,
    category_ids: Sequence[int | None],
    size: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Return one image's detections as entries of a COCO result file.

    Args:
        detections: boxes ``xyxy`` in the pixels of the image.
        image_id: the annotation file's.
        category_ids: the annotation file's category id of each contiguous label; detections of classes
            without one (None) are left out.
        size: (height, width) of the image; masks that are not pasted yet need it.

    Returns:
        Entries with ``bbox`` (x, y, width, height), ``score`` and, for a model with masks, ``segmentation``
        (compressed RLE with text counts). Widths and heights are float32 differences, as in detectron2.
    """
    if None in category_ids:
        listed = torch.tensor([category_id is not None for category_id in category_ids])
        detections = detections[listed.to(detections.labels.device)[detections.labels]]
    corners = detections.boxes.cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    entries: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(
            detections.labels.tolist(), boxes.tolist(), detections.scores.tolist(), strict=True
        )
    ]
    if detections.masks is not None and len(entries):
        for entry, rle in zip(entries, _encode(detections, size), strict=True):
            entry["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    return entries


def _encode(detections: Detections, size: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    """Yield COCO's RLE of the masks, one by one: all masks of a large image are several GB.

    pycocotools would read every pixel of the image, columns first. It gets the lengths of the runs instead.
    """
    masks = detections.masks
    assert masks is not None
    if isinstance(masks, RleMasks):
        yield from map(masks.rle, range(len(masks)))
        return
    height, width = masks.shape[1:] if size is None or masks.dtype == torch.bool else size
    for top, left, part in mask_parts(masks, detections.boxes, (height, width)):
        yield encode_part(part.numpy(), top, left, (height, width))


def mask_parts(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield masks, pasted already or not, as :func:`gn_detect.ops.paste_one_by_one` does."""
    return _moved(masks) if masks.dtype == torch.bool else paste_one_by_one(masks, boxes, size)


def encode_part(part: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return COCO's compressed RLE of a mask in an image of ``size``; see :func:`_run_lengths`."""
    return coco_mask.frPyObjects({"size": size, "counts": _run_lengths(part, top, left, size)}, *size)


def _run_lengths(part: np.ndarray, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    """Return the lengths of the runs of 0 and 1 of a mask, columns first; the first one is of zeros.

    Args:
        part: bool (h, w), the pixels from row ``top`` and column ``left``; all others are False.
        top, left: position of the part.
        size: (height, width) of the image.
    """
    height, width = size
    edges = np.zeros((len(part) + 1, part.shape[1]), dtype=bool)  # above each pixel, and below the last row
    edges[:-1] = part
    edges[1:] ^= part
    rows, columns = np.divmod(np.flatnonzero(edges), max(1, part.shape[1]))
    places = np.sort((left + columns) * height + top + rows)
    # A run that goes on at the top of the next column has an end and a start at one place.
    same = np.flatnonzero(places[1:] == places[:-1])
    places = np.delete(places, np.concatenate([same, same + 1]))
    places = places[: np.searchsorted(places, height * width)]  # the end of the image ends the last run
    return np.diff(places, prepend=0, append=height * width)


def _moved(masks: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (N, H, W) masks one by one as :func:`paste_one_by_one` does, moved to the CPU some at a time."""
    for part in masks.split(max(1, _MOVED_BYTES // (masks.shape[1] * masks.shape[2]))):
        yield from ((0, 0, mask) for mask in part.cpu())


@contextmanager
def detection_memory_help(what: str, images: int = 1) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one that names the images and the keys, and free the memory.

    Args:
        what: the images with their sizes, such as ``"an image of 8000 x 6000 pixels"``.
        images: number of images in the batch.

    Raises:
        UserError: there was too little memory; the next images may still fit.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the network
        torch.cuda.empty_cache()
        batch = f"lower TEST.IMS_PER_BATCH ({images}); or " if images > 1 else ""
        raise UserError("out-of-memory", f"out of GPU memory with {what}; {batch}{LESS_MEMORY}") from error


def evaluate_model(
    model: MaskRCNN,
    loader: Iterable[list[Sample]],
    dataset: CocoDataset,
    output_dir: str | Path,
    *,
    backend: str | None = None,
    iou_types: Sequence[str] = IOU_TYPES,
    stop: Stop | None = None,
    detector: Detector | None = None,
) -> Outcome:
    """Run a model on a dataset and compute its AP.

    In a process group each process takes the images of its own loader. The first process evaluates, and all
    return the same numbers.

    Args:
        model: on its device; each of its modules keeps its mode, training or not.
        loader: batches of Samples.
        dataset: names the annotation file and the categories.
        output_dir: folder for ``coco_instances_results.json``; created if it is missing.
        backend: see :func:`evaluate_kinds`.
        iou_types: some of ``"bbox"``, ``"segm"`` and ``"boundary"``.
        stop: asked after each batch.
        detector: detects in place of the model, with whose weights it works.

    Returns:
        ``{"bbox": {"AP": ..., ...}, "segm": {...}, "diagnosis": {"bbox": {...}, "segm": {...}}}`` in percent;
        see :func:`diagnose` for the last. Boundary AP is under ``"boundary"``.

    Raises:
        Interrupted: ``stop`` requests it; in all processes.
        UserError: see :func:`evaluate_kinds`; in all processes. The detections are written by then, unless
            the backend is missing.
    """
    backend = choose_backend(backend)  # before the work, as it may be missing
    path = Path(output_dir) / RESULTS_FILE
    category_ids = [dataset.spelt_categories.get(i, i) for i in dataset.category_ids]
    with in_evaluation_mode(model):
        found = _detect(detector or model, loader, category_ids, stop)
        if is_main():
            _write_results(found, path, stop)
        else:
            _send_results(found, stop)
    outcome: Outcome | UserError | Interrupted = {}
    if is_main():
        try:
            with nullcontext() if stop is None else stop.at_once():
                outcome = _evaluate(path, dataset, backend, iou_types)
        except (UserError, Interrupted) as error:
            outcome = error  # the other processes wait for it
    outcome = from_main(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _write_results(found: Iterable[list[dict[str, Any]]], path: Path, stop: Stop | None) -> None:
    """Write the detections of all processes, those of this one without delay."""
    with atomic_write(path) as file:
        results = ResultsWriter(file)
        for entries in found:
            results.add(entries)
        agree(stop)
        for text in gather_text(None) if world_size() > 1 else ():
            results.add_text(text)
        results.end()


def _send_results(found: Iterable[list[dict[str, Any]]], stop: Stop | None) -> None:
    """Send the detections of another process; they stay on its disk until the first process has finished."""
    with tempfile.TemporaryFile("w+", encoding="ascii") as spool:
        for entries in found:
            spool.writelines(map(entry_text, entries))
        agree(stop)
        for _ in gather_text(spool):
            pass


def agree(stop: Stop | None) -> None:
    """Raise Interrupted in all processes together, or in none."""
    if stop is not None and stop.requested():
        raise Interrupted


@contextmanager
def in_evaluation_mode(model: MaskRCNN) -> Iterator[None]:
    """Restore the mode of every module at the end: some may be frozen on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(False)
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def _evaluate(path: Path, dataset: CocoDataset, backend: str, iou_types: Sequence[str]) -> Outcome:
    begin = time.perf_counter()
    metrics, diagnosis = evaluate_and_diagnose(dataset.annotations_path, path, iou_types, backend)
    logger.info("evaluated in %.1f s: %s", time.perf_counter() - begin, path)
    logger.info("%s\n%s", dataset.name, Lines(format_results(metrics) + "\n" + format_errors(diagnosis)))
    return {**metrics, DIAGNOSIS: diagnosis}


def _detect(
    model: Detector, loader: Iterable[list[Sample]], category_ids: Sequence[int | None], stop: Stop | None
) -> Iterator[list[dict[str, Any]]]:
    """Yield this process's detections image by image, with masks as RLE: bitmaps would fill the memory.

    They end early if a process is asked to stop.
    """
    seconds = {"data": 0.0, "model": 0.0, "results": 0.0}
    images = 0
    last = time.perf_counter()

    def count(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    batches: Iterable[list[Sample]] = progress_bar(loader, desc="evaluating", unit="batch", shown=is_main())
    if isinstance(model, MaskRCNN):  # other detectors change the images on the host
        batches = send_ahead(batches, model.device)
    with detection_memory_help("the next images"):  # which are sent ahead
        for batch in batches:
            count("data")
            with detection_memory_help(_name_images(batch), len(batch)), torch.inference_mode():
                sizes = [sample.original_size for sample in batch]
                found = model.detect([sample.image for sample in batch], sizes, paste=False)
            count("model")
            for sample in batch:
                # pop: the masks of a large image must be gone before the next image
                yield detections_to_coco(found.pop(0), sample.image_id, category_ids, sample.original_size)
            images += len(batch)
            count("results")
            if stop is not None and stop.seen():
                return
    spent = ", ".join(f"{part} {value:.1f} s" for part, value in seconds.items())
    logger.info("%d images, %.1f images/s (%s)", images, images / max(sum(seconds.values()), 1e-9), spent)


def _name_images(batch: Sequence[Sample]) -> str:
    """Return the files with their sizes, on disk and for the network."""
    named = []
    for sample in batch:
        (height, width), (rows, columns) = sample.original_size, sample.image.shape[-2:]
        named.append(f"{sample.file_name} ({width} x {height} pixels, resized to {columns} x {rows})")
    return ", ".join(named)
