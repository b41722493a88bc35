"""Detections of many images, or of a video, as pictures and as COCO results; the model does not wait."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from ..data import read_image
from ..data.video import Frame, VideoWriter, count_frames, read_frames
from ..errors import UserError
from ..evaluation import ResultsWriter, detections_to_coco
from ..evaluation.model import detection_memory_help
from ..files import atomic_write, atomic_write_json
from ..modeling.mask_rcnn import MaskRCNN
from ..progress import progress_bar
from ..structures import Detections
from ..text import printable
from ..visualize import picture_scale, save_picture
from .drawing import Classes, draw_entries
from .pipeline import drawing_processes, in_order, reading_threads

if TYPE_CHECKING:
    from ..config import Config

Json = dict[str, Any]

Scores = list[float]


class AnyPredictor(Protocol):
    """What is needed of a predictor; :class:`gn_detect.Predictor` has it."""

    cfg: Config
    class_names: list[str]

    @property
    def category_ids(self) -> Sequence[int | None]:
        """By label, None for a class that is left out of the results."""

    def find(self, image: np.ndarray) -> Detections:
        """Objects in (H, W, 3) uint8 RGB pixels, in the image's pixels, best first, masks pasted or not."""


@dataclass(frozen=True)
class Task:
    """An image to predict on.

    Attributes:
        path: of the image.
        image_id: in the results.
        picture: to write.
        objects: the image's ground truth, see :func:`draw_entries`; None without.
        size: (height, width) that the ground truth states, see :func:`gn_detect.data.read_image`.
    """

    path: Path
    image_id: Any
    picture: Path
    objects: Sequence[Json] | None = None
    size: tuple[int, int] | None = None


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        images, objects: how many were predicted on, and found.
        failures: a message for each image that cannot be read, or not be predicted on, as where the memory
            of the GPU is too small for it.
        best_score: the highest of all, also of those below the threshold; None without any.
        best_input: the image or frame that has it.
    """

    images: int = 0
    objects: int = 0
    best_score: float | None = None
    best_input: str = ""
    failures: list[str] = field(default_factory=list)

    def compare(self, score: float | None, name: str) -> None:
        """Keep the highest score of one image or frame if it is the best so far."""
        if score is not None and (self.best_score is None or score > self.best_score):
            self.best_score, self.best_input = score, name


@dataclass(frozen=True)
class _Found:
    task: Task
    size: tuple[int, int]
    entries: list[Json]


def predict_images(
    predictor: AnyPredictor,
    tasks: Sequence[Task],
    folder: Path,
    *,
    threshold: float = 0.5,
    workers: int = 1,
    pictures: bool = True,
) -> Outcome:
    """Write a picture for each image, and ``predictions.json`` and ``images.json`` for all.

    ``predictions.json`` is a COCO result file; each entry also has ``file_name``. ``images.json`` lists
    images and categories as an annotation file does, so that COCO's tools load both together.

    Args:
        predictor: of the objects.
        tasks: the images; one that cannot be read is left out and named in the outcome.
        folder: of both files.
        threshold: the least score of what is drawn and written.
        workers: threads that read and processes that draw, beside the model; 0 does all in turn.
        pictures: without them, only the files are written.

    Raises:
        UserError: something cannot be written; files that are there are whole.
    """
    classes = Classes(predictor.class_names, predictor.category_ids)
    outcome, records = Outcome(), []

    def detect(read: Iterator[tuple[Task, np.ndarray | UserError]]) -> Iterator[_Drawing]:
        for task, pixels in read:
            try:
                if isinstance(pixels, UserError):
                    raise pixels
                with detection_memory_help(f"an image of {_size_of(pixels)}"):
                    entries, best = _detect(predictor, pixels, task.image_id, threshold, highest)
            except UserError as error:
                message = str(error) if error is pixels else f"{task.path}: {error}"
                outcome.failures.append(message)
                tqdm.write(f"error: {printable(message)}", file=sys.stderr)
                progress.update()
                continue
            outcome.compare(best, str(task.path))
            yield _Drawing(task, pixels, entries, classes, pictures)

    with (
        highest_scores(predictor) as highest,
        atomic_write(folder / "predictions.json") as file,
        reading_threads(min(workers, 4)) as readers,
        drawing_processes(workers if pictures else 0, len(tasks)) as drawers,
        progress_bar(total=len(tasks), unit="image", leave=True) as progress,
    ):
        results = ResultsWriter(file)
        read = in_order(readers, _read, tasks, min(workers, 4) + 2)
        for found in in_order(drawers, _draw, detect(read), 2 * workers + 2):
            results.add({**entry, "file_name": str(found.task.path)} for entry in found.entries)
            records.append(_record(found))
            outcome.objects += len(found.entries)
            progress.update()
        results.end()
    outcome.images = len(records)
    atomic_write_json(folder / "images.json", _as_coco(records, classes))
    return outcome


@dataclass(frozen=True)
class _Drawing:
    """What goes to a drawing process: masks as RLE, a hundredth of their bitmaps."""

    task: Task
    pixels: np.ndarray
    entries: list[Json]
    classes: Classes
    wanted: bool


def _read(task: Task) -> tuple[Task, np.ndarray | UserError]:
    """Pixels, or what is wrong with the image."""
    try:
        return task, read_image(task.path, "RGB", task.size)
    except UserError as error:
        return task, error


@contextmanager
def highest_scores(predictor: AnyPredictor) -> Iterator[Scores]:
    """Yield a list to which the box head appends the highest score of each batch of RoIs.

    Detections are only what scores more than ``MODEL.ROI_HEADS.SCORE_THRESH_TEST``. For an exported model the
    list stays empty.
    """
    scores: Scores = []

    def note(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        foreground = output[0].detach().float().softmax(dim=1)[:, :-1]
        if foreground.numel():
            scores.append(float(foreground.nan_to_num().max()))

    model = getattr(predictor, "model", None)
    if not isinstance(model, MaskRCNN):
        yield scores
        return
    hook = model.roi_heads.box_predictor.register_forward_hook(note)
    try:
        yield scores
    finally:
        hook.remove()


def _detect(
    predictor: AnyPredictor, pixels: np.ndarray, image_id: Any, threshold: float, highest: Scores
) -> tuple[list[Json], float | None]:
    found = predictor.find(pixels)
    count = int((found.scores >= threshold).sum())
    # The best come first, and a slice copies no masks.
    entries = detections_to_coco(found[:count], image_id, predictor.category_ids, pixels.shape[:2])
    scores = [*found.scores[:1].tolist(), *highest]
    highest.clear()
    return entries, max(scores, default=None)


def _size_of(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    return f"{width} x {height} pixels"


def _draw(drawing: _Drawing) -> _Found:
    if drawing.wanted:
        picture = draw_entries(drawing.pixels, drawing.entries, drawing.classes, drawing.task.objects)
        save_picture(drawing.task.picture, picture)
    return _Found(drawing.task, drawing.pixels.shape[:2], drawing.entries)


def _record(found: _Found) -> Json:
    height, width = found.size
    return {
        "id": found.task.image_id,
        "file_name": str(found.task.path),
        "width": width,
        "height": height,
    }


def _as_coco(records: list[Json], classes: Classes) -> Json:
    return {"images": records, "annotations": [], "categories": _categories(classes)}


def _categories(classes: Classes) -> list[Json]:
    pairs = zip(classes.category_ids, classes.names, strict=True)
    return [{"id": i, "name": name} for i, name in pairs if i is not None]


def predict_video(
    predictor: AnyPredictor, path: Path, output: Path, *, threshold: float = 0.5, workers: int = 1
) -> Outcome:
    """Write a video with what was found, and its detections frame by frame.

    Args:
        predictor: of the objects.
        path: any video that PyAV reads.
        output: the .mp4 to write; beside it, with .jsonl, come lines ``{"frame": from 0, "time": in
            seconds, "objects": [COCO results]}``, the ``image_id`` of a frame being its number.
        threshold, workers: see :func:`predict_images`.

    Raises:
        UserError: PyAV is missing, the video cannot be read, the GPU has too little memory, or something
            cannot be written; nothing is.
    """
    classes, outcome = Classes(predictor.class_names, predictor.category_ids), Outcome()
    total = count_frames(path)

    def detect(frames: Iterator[Frame]) -> Iterator[_FrameDrawing]:
        for frame in frames:
            what = f"frame {frame.number} of {path}, of {_size_of(frame.pixels)}"
            with detection_memory_help(what):
                entries, best = _detect(predictor, frame.pixels, frame.number, threshold, highest)
            outcome.compare(best, f"frame {frame.number} of {path}")
            yield _FrameDrawing(frame, entries, classes)

    with (
        highest_scores(predictor) as highest,
        atomic_write(output, "wb") as video_file,
        atomic_write(output.with_suffix(".jsonl")) as lines,
        reading_threads(min(workers, 1)) as reader,
        drawing_processes(workers, total or 10 * workers) as drawers,
        reading_threads(min(workers, 1)) as encoder,
        progress_bar(total=total or None, unit="frame", leave=True) as progress,
    ):
        writer = VideoWriter(video_file, output)
        frames = _until_none(in_order(reader, _next(read_frames(path)), _for_ever(), 4))
        drawn = in_order(drawers, _draw_frame, detect(frames), 2 * workers + 2)
        for frame, entries in in_order(encoder, _encode(writer), drawn, 4):
            lines.write(json.dumps({"frame": frame.number, "time": frame.time, "objects": entries}) + "\n")
            outcome.images, outcome.objects = outcome.images + 1, outcome.objects + len(entries)
            progress.update()
        writer.end()
    return outcome


@dataclass(frozen=True)
class _FrameDrawing:
    frame: Frame
    entries: list[Json]
    classes: Classes


def _draw_frame(drawing: _FrameDrawing) -> tuple[Frame, list[Json]]:
    """The frame with its drawings; all are of one size, however many objects there are."""
    frame = drawing.frame
    scale = picture_scale(frame.pixels.shape[:2], np.zeros((0, 4)))
    picture = draw_entries(frame.pixels, drawing.entries, drawing.classes, scale=scale)
    return Frame(frame.number, frame.time, picture), drawing.entries


def _next(frames: Iterator[Frame]) -> Callable[[None], Frame | None]:
    return lambda _: next(frames, None)


def _for_ever() -> Iterator[None]:
    while True:
        yield None


def _until_none(frames: Iterator[Frame | None]) -> Iterator[Frame]:
    for frame in frames:
        if frame is None:
            return
        yield frame


def _encode(
    writer: VideoWriter,
) -> Callable[[tuple[Frame, list[Json]]], tuple[Frame, list[Json]]]:
    def encode(drawn: tuple[Frame, list[Json]]) -> tuple[Frame, list[Json]]:
        writer.add(drawn[0].pixels, drawn[0].time)
        return drawn

    return encode
