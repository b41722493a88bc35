"""Detections of many images, or of a video, as pictures and as COCO results.

``in_order(pool, draw, (model(image) for image in in_order(pool, read, paths)))`` is the whole pipeline: the
caller's thread runs the model, while others read the next images and draw the last ones, in bounded memory.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import read_image
from ..data.video import Frame, VideoWriter, count_frames, read_frames
from ..errors import UserError
from ..evaluation import ResultsWriter, detections_to_coco
from ..evaluation.model import detection_memory_help
from ..files import atomic_write, atomic_write_json
from ..modeling.mask_rcnn import MaskRCNN
from ..modeling.roi_heads import mean_scores
from ..progress import progress_bar
from ..visualize import picture_scale, save_picture
from .drawing import Classes, draw_entries

if TYPE_CHECKING:
    from .predictor import ImagePredictor

T = TypeVar("T")
R = TypeVar("R")
Json = dict[str, Any]

_IMAGES_PER_PROCESS = 16  # a process takes seconds to start, and pays off for so many images


@dataclass(frozen=True)
class Task:
    """An image to predict on."""

    path: Path
    image_id: Any
    picture: Path  # to write
    objects: Sequence[Json] | None = None  # ground truth, see draw_entries
    size: tuple[int, int] | None = None  # (height, width) that the ground truth states, see read_image


@dataclass
class Outcome:
    """The result of a prediction on many images."""

    images: int = 0
    objects: int = 0
    best_score: float | None = None  # the highest, also below the threshold; None without any
    best_input: str = ""  # the image or frame with the best score
    failures: list[UserError] = field(default_factory=list)  # one for each image without a result

    def compare(self, score: float | None, name: str) -> None:
        """Keep the highest score of one image or frame if it is the best so far."""
        if score is not None and (self.best_score is None or score > self.best_score):
            self.best_score, self.best_input = score, name


@dataclass(frozen=True)
class _Found:
    """An image with its detections, for a drawing process: masks as RLE, a hundredth of their bitmaps."""

    task: Task
    pixels: np.ndarray
    entries: list[Json]
    classes: Classes | None  # None: no picture is wanted


def predict_images(
    predictor: ImagePredictor,
    tasks: Sequence[Task],
    folder: Path,
    *,
    threshold: float | Sequence[float] = 0.5,
    workers: int = 1,
    pictures: bool = True,
    category_ids: Sequence[int | None] | None = None,
) -> Outcome:
    """Write a picture for each image, and ``predictions.json`` and ``images.json`` for all.

    ``predictions.json`` is a COCO result file; each entry also has ``file_name``. ``images.json`` lists
    images and categories as an annotation file does, so that COCO's tools load both together.

    Args:
        predictor: the model.
        tasks: the images; one that cannot be read is left out and named in the outcome.
        folder: gets both files.
        threshold: the lowest score in pictures and files, of all classes or by label.
        workers: threads that read and processes that draw; 0 does all in turn.
        pictures: False writes only the files.
        category_ids: by label, in place of the predictor's; detections of a class with None are left out.

    Raises:
        UserError: something cannot be written; the files that are there are whole.
    """
    classes = Classes(predictor.class_names, category_ids or predictor.category_ids)
    outcome, records = Outcome(), []

    def detect(read: Iterator[tuple[Task, np.ndarray | UserError]]) -> Iterator[_Found]:
        for task, pixels in read:
            try:
                if isinstance(pixels, UserError):
                    raise pixels
                with detection_memory_help(f"an image of {_size_of(pixels)}"):
                    entries, best = _detect(predictor, pixels, task.image_id, classes, threshold, highest)
            except UserError as error:
                failure = error if error is pixels else UserError(error.code, f"{task.path}: {error}")
                outcome.failures.append(failure)
                tqdm.write(f"error: {failure.line}", file=sys.stderr)
                progress.update()
                continue
            outcome.compare(best, str(task.path))
            yield _Found(task, pixels, entries, classes if pictures else None)

    with (
        highest_scores(predictor) as highest,
        atomic_write(folder / "predictions.json") as file,
        reading_threads(min(workers, 4)) as readers,
        drawing_processes(workers if pictures else 0, len(tasks)) as drawers,
        progress_bar(total=len(tasks), unit="image", leave=True) as progress,
    ):
        results = ResultsWriter(file)
        read = in_order(readers, _read, tasks, min(workers, 4) + 2)
        for task, (height, width), entries in in_order(drawers, _draw, detect(read), 2 * workers + 2):
            name = str(task.path)
            results.add({**entry, "file_name": name} for entry in entries)
            records.append({"id": task.image_id, "file_name": name, "width": width, "height": height})
            outcome.objects += len(entries)
            progress.update()
        results.end()
    outcome.images = len(records)
    pairs = zip(classes.category_ids, classes.names, strict=True)
    categories = [{"id": i, "name": name} for i, name in pairs if i is not None]
    content = {"images": records, "annotations": [], "categories": categories}
    atomic_write_json(folder / "images.json", content)
    return outcome


def _read(task: Task) -> tuple[Task, np.ndarray | UserError]:
    try:
        return task, read_image(task.path, "RGB", task.size)
    except UserError as error:
        return task, error


def _draw(found: _Found) -> tuple[Task, tuple[int, ...], list[Json]]:
    if found.classes is not None:
        picture = draw_entries(found.pixels, found.entries, found.classes, found.task.objects)
        save_picture(found.task.picture, picture)
    return found.task, found.pixels.shape[:2], found.entries


@contextmanager
def highest_scores(predictor: ImagePredictor) -> Iterator[list[float]]:
    """Yield a list to which the box head appends the highest score of each batch of RoIs.

    Detections are only those that score more than ``MODEL.ROI_HEADS.SCORE_THRESH_TEST``. For an exported
    model the list stays empty.
    """
    scores: list[float] = []
    by_stage: list[Tensor] = []  # a cascade has several predictors, and their mean counts

    def note(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        if module is predictors[0]:
            by_stage.clear()
        by_stage.append(output[0].detach().float().softmax(dim=1))
        if module is not predictors[-1]:
            return
        foreground = mean_scores(by_stage)[:, :-1]
        if foreground.numel():
            scores.append(float(foreground.nan_to_num().max()))

    model = getattr(predictor, "model", None)
    if not isinstance(model, MaskRCNN):
        yield scores
        return
    predictors = model.roi_heads.predictors
    hooks = [each.register_forward_hook(note) for each in predictors]
    try:
        yield scores
    finally:
        for hook in hooks:
            hook.remove()


def _detect(
    predictor: ImagePredictor,
    pixels: np.ndarray,
    image_id: Any,
    classes: Classes,
    threshold: float | Sequence[float],
    highest: list[float],
) -> tuple[list[Json], float | None]:
    found = predictor.find(pixels)
    scores = [*found.scores[:1].tolist(), *highest]
    lowest = threshold if isinstance(threshold, int | float) else min(threshold)
    # The best come first, and a slice copies no masks.
    kept = found[: int((found.scores >= lowest).sum())]
    if not isinstance(threshold, int | float):
        least = torch.tensor(threshold, dtype=torch.float64, device=kept.labels.device)
        kept = kept[(kept.scores >= least[kept.labels]).nonzero()[:, 0]]
    entries = detections_to_coco(kept, image_id, classes.category_ids, pixels.shape[:2])
    highest.clear()
    return entries, max(scores, default=None)


def _size_of(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]} pixels"


def predict_video(
    predictor: ImagePredictor,
    path: Path,
    output: Path,
    *,
    threshold: float | Sequence[float] = 0.5,
    workers: int = 1,
) -> Outcome:
    """Write a video with its detections drawn, and the detections frame by frame.

    Args:
        predictor: the model.
        path: a video that PyAV reads.
        output: the .mp4 to write. A .jsonl of the same name gets lines ``{"frame": from 0, "time": in
            seconds, "objects": [COCO results]}``; the ``image_id`` of a frame is its number.
        threshold, workers: see :func:`predict_images`.

    Raises:
        UserError: PyAV is missing, the video cannot be read, the GPU has too little memory, or something
            cannot be written; no file is left then.
    """
    classes, outcome = Classes(predictor.class_names, predictor.category_ids), Outcome()
    total = count_frames(path)

    def detect(frames: Iterator[Frame]) -> Iterator[tuple[Frame, list[Json], Classes]]:
        for frame in frames:
            name = f"frame {frame.number} of {path}"
            with detection_memory_help(f"{name}, of {_size_of(frame.pixels)}"):
                entries, best = _detect(predictor, frame.pixels, frame.number, classes, threshold, highest)
            outcome.compare(best, name)
            yield frame, entries, classes

    def encode(drawn: tuple[Frame, list[Json]]) -> tuple[Frame, list[Json]]:
        writer.add(drawn[0].pixels, drawn[0].time)
        return drawn

    with (
        highest_scores(predictor) as highest,
        atomic_write(output, "wb") as video_file,
        atomic_write(output.with_suffix(".jsonl")) as lines,
        reading_threads(min(workers, 1)) as reader,
        drawing_processes(workers, total or 10 * workers) as drawers,
        reading_threads(min(workers, 1)) as encoder,
        progress_bar(total=total or None, unit="frame", leave=True) as progress,
    ):
        writer, source = VideoWriter(video_file, output), read_frames(path)
        read = in_order(reader, lambda _: next(source, None), repeat(None), 4)
        frames = iter(lambda: next(read), None)  # until the source is empty
        drawn = in_order(drawers, _draw_frame, detect(frames), 2 * workers + 2)
        for frame, entries in in_order(encoder, encode, drawn, 4):
            lines.write(json.dumps({"frame": frame.number, "time": frame.time, "objects": entries}) + "\n")
            outcome.images, outcome.objects = outcome.images + 1, outcome.objects + len(entries)
            progress.update()
        writer.end()
    return outcome


def _draw_frame(found: tuple[Frame, list[Json], Classes]) -> tuple[Frame, list[Json]]:
    """Draw a frame; all get one size, however many objects there are."""
    frame, entries, classes = found
    scale = picture_scale(frame.pixels.shape[:2], np.zeros((0, 4)))
    return Frame(frame.number, frame.time, draw_entries(frame.pixels, entries, classes, scale=scale)), entries


def default_workers() -> int:
    """Return the number of cores without the one that runs the model, from 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))


def reading_threads(workers: int) -> AbstractContextManager[Executor | None]:
    """Return threads that read files, as decoders release the interpreter; None for no workers."""
    return _closing(ThreadPoolExecutor(workers, "read") if workers > 0 else None)


def drawing_processes(workers: int, pictures: int) -> AbstractContextManager[Executor | None]:
    """Return processes that draw, as threads of Python code would slow down the model; None for no workers.

    Args:
        workers: the most processes.
        pictures: number of pictures to draw; a few get one thread.
    """
    count = min(workers, pictures // _IMAGES_PER_PROCESS)
    if workers < 1:
        return _closing(None)
    # Not forked: the model's threads hold locks that would stay locked in a copy.
    spawn = multiprocessing.get_context("spawn")
    return _closing(ProcessPoolExecutor(count, spawn) if count else ThreadPoolExecutor(1, "draw"))


@contextmanager
def _closing(pool: Executor | None) -> Iterator[Executor | None]:
    """Drop the waiting work when an error, or Ctrl-C, ends the block."""
    try:
        yield pool
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    pool: Executor | None, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[R]:
    """Map in a pool, with at most ``ahead`` items and results in memory.

    Args:
        pool: None calls the function here.
        function: an error in it is raised here, in its turn.
        items: taken in this thread, each when there is room for it.
        ahead: items in work, or finished and not yet taken; at least 1.

    Raises:
        UserError: a process of the pool was killed.
    """
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= max(ahead, 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor as error:
        raise UserError(
            "process-killed",
            "a drawing process was killed, mostly for want of memory; use fewer with --workers 1, or 0",
        ) from error
    finally:
        for future in waiting:
            future.cancel()
