"""``gn-detect predict``: objects in images and videos, as pictures and as COCO results."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..text import printable
from .options import (
    NO_CONFIG,
    add_fix_argument,
    add_other_classes_argument,
    add_weights_argument,
    check_threshold,
    read_config_file,
    take_checkpoint,
    take_weights,
)
from .output import Result

if TYPE_CHECKING:
    from ..engine import Predictor
    from ..engine.predict_files import Outcome, Task
    from ..engine.predictor import ImagePredictor
    from ..evaluation import Truth
    from ..export import ExportedPredictor

EXAMPLES = """
gn-detect predict runs/one/model_best.pth photo.jpg
gn-detect predict runs/one --output found --threshold 0.7 photos 'more/*.png' TEST.DETECTIONS_PER_IMAGE 300
gn-detect predict --config-file runs/one/config.yaml --weights runs/one/model_best.pth \\
    --annotations val.json images
gn-detect predict model.onnx clip.mp4
gn-detect predict runs/one slides --tile 800 --overlap 0.2
"""

AUTO = "auto"
_SHOWN = 8  # classes
UNREADABLE = 1  # exit status when some inputs could not be read; the others are done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="config.yaml of a run; weights hold their own")
    add_weights_argument(parser)
    add("--model", metavar="FILE", help="a file of gn-detect export, in place of a checkpoint")
    add("--trust", action="store_true", help="run a --model of PyTorch (.pt2), which is a program")
    add(
        "--output",
        metavar="FOLDER",
        default="predictions",
        help="for pictures, predictions.json and images.json",
    )
    add(
        "--threshold",
        type=_threshold,
        default=0.5,
        metavar="SCORE",
        help="least score of what is drawn and written; auto: for each class the one with the best F1 on the "
        "test images of the training",
    )
    add(
        "--annotations",
        metavar="FILE",
        help="COCO ground truth: it is drawn next to the detections and gives the image ids of the results; "
        "other images of a folder or quoted pattern are left out",
    )
    add_other_classes_argument(parser, "with --annotations: take")
    add(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="search square tiles of large images, and join the parts of what they cut (TEST.TILES.SIZE)",
    )
    add(
        "--overlap",
        type=float,
        metavar="PART",
        help="least part of its side that a tile shares with the next, from 0 to 0.9 (TEST.TILES.OVERLAP)",
    )
    add("--no-pictures", action="store_true", help="write the results of images alone")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="threads that read and processes that draw; by default the cores that the model leaves",
    )
    add_fix_argument(parser)
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a checkpoint, unless a flag names one; images, videos, folders or patterns; KEY VALUE ...",
    )


def _threshold(text: str) -> float | str:
    return text if text == AUTO else float(text)


def run(args: argparse.Namespace) -> Result:
    """Write one picture for each image, results for all, and a video for each video."""
    from ..data.images import find_images
    from ..engine.predict_files import default_workers, predict_images
    from ..evaluation import read_truth
    from ..export.write import SUFFIXES as EXPORTED
    from ..progress import fitted
    from .inputs import is_video, name_outputs, split_overrides

    if args.threshold != AUTO:
        check_threshold(args.threshold)
    if args.other_classes and not args.annotations:
        raise UserError("lone-flag", "--other-classes says how --annotations are read; give them, too")
    texts, overrides = split_overrides(args.inputs)
    if not args.model and texts and texts[0].endswith(EXPORTED):
        args.model, *texts = texts
    elif not args.model and "MODEL.WEIGHTS" not in overrides[::2]:
        texts = take_checkpoint(args, texts)
        if not (args.weights or args.config_file):
            raise UserError("no-config", NO_CONFIG)
    if "OUTPUT_DIR" in overrides[::2]:
        raise UserError(
            "conflicting-flags", "predict writes into the folder of --output, and OUTPUT_DIR has no effect"
        )
    if args.weights and args.weights.endswith(EXPORTED):
        raise UserError(
            "conflicting-flags", f"{args.weights} was exported: give it by --model, without --config-file"
        )
    found = find_images(texts, videos=True)
    workers = default_workers() if args.workers is None else args.workers
    if workers < 0:
        raise UserError("bad-argument", f"--workers {workers}: it must be 0 or more")
    truth = read_truth(args.annotations) if args.annotations else None
    paths = found if truth is None else keep_listed(found, texts, truth)
    output = Path(args.output)
    named = list(zip(paths, name_outputs(paths), strict=True))
    check_replaces_nothing(named, found, output, args)
    tasks = make_tasks([(path, name) for path, name in named if not is_video(path)], output, truth)
    predictor = make_predictor(args, overrides)
    print(predictor.report)
    category_ids = None if truth is None else match_categories(predictor, truth, args.other_classes)
    thresholds = score_thresholds(predictor) if args.threshold == AUTO else [args.threshold]
    least = thresholds if args.threshold == AUTO else args.threshold
    settings: dict[str, Any] = {"threshold": least, "workers": workers}
    outcomes = []
    if tasks:
        pictures = not args.no_pictures
        outcome = predict_images(
            predictor, tasks, output, pictures=pictures, category_ids=category_ids, **settings
        )
        print(f"{outcome.objects} objects in {outcome.images} images: see {output}")
        outcomes.append(outcome)
    for path, name in named:
        if is_video(path):
            outcomes.append(predict_one_video(predictor, path, output / name, **settings))
    failures = [failure for outcome in outcomes for failure in outcome.failures]
    if failures:
        print(f"{len(failures)} of {len(paths)} inputs could not be read", file=sys.stderr)
    counts = {key: sum(getattr(outcome, key) for outcome in outcomes) for key in ("images", "objects")}
    counts["left_out"] = len(found) - len(paths)
    best = max(outcomes, key=lambda outcome: outcome.best_score or 0.0)
    if counts["images"] and not counts["objects"]:
        print(fitted(nothing_found(predictor, best, min(thresholds)), sys.stdout))
    scores = {"best_score": best.best_score, "best_input": best.best_input}
    described = [{"code": failure.code, "message": str(failure)} for failure in failures]
    value = {**counts, **scores, "output": str(output), "failures": described}
    return Result(value, UNREADABLE if failures else 0)


def score_thresholds(predictor: ImagePredictor) -> list[float]:
    """Return the weights' own least score of each class, and print them if they are few."""
    found = predictor.score_thresholds
    if not found:
        raise UserError(
            "no-thresholds",
            "--threshold auto: these weights hold no score thresholds; take those of a training that was "
            "evaluated on a test set, or give a number",
        )
    named = [f"{name} {score:.2f}" for name, score in zip(predictor.class_names, found, strict=True)]
    more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    print(printable(f"least scores: {', '.join(named[:_SHOWN])}{more}"))
    return found


def nothing_found(predictor: ImagePredictor, best: Outcome, threshold: float) -> str:
    """Return the message for no object above the threshold: the best score, its image, a remedy."""
    least = predictor.cfg.model.roi_heads.score_thresh_test
    if best.best_score is None:
        return (
            f"no object scores {threshold:g} (--threshold) or more, and none scores more than {least:g}, "
            f"MODEL.ROI_HEADS.SCORE_THRESH_TEST of the model; train longer, or export it with a lower one"
        )
    # One digit, rounded down; a score must be above SCORE_THRESH_TEST and not equal to it.
    unit = 10.0 ** math.floor(math.log10(max(best.best_score, 1e-6)))
    lower = f"{max(math.floor(best.best_score / unit * 0.999), 1) * unit:.6g}"
    key = f" and, after the images, MODEL.ROI_HEADS.SCORE_THRESH_TEST {lower}"
    return (
        f"no object scores {threshold:g} (--threshold) or more: the best score is {best.best_score:.3g}, in "
        f"{best.best_input}; try --threshold {lower}{key if best.best_score <= least else ''}"
    )


def make_predictor(args: argparse.Namespace, overrides: list[str]) -> Predictor | ExportedPredictor:
    """Return the predictor of ``--model``, or of ``--config-file`` and ``--weights``, with ``--tile``."""
    from ..engine import Predictor
    from ..engine.predictor import with_tiles
    from ..export import ExportedPredictor

    for flag, key in (("tile", "TEST.TILES.SIZE"), ("overlap", "TEST.TILES.OVERLAP")):
        if getattr(args, flag) is not None and key in overrides[::2]:
            raise UserError("conflicting-flags", f"--{flag} and {key} name the same thing; give one")
    if args.model:
        flags = {"--config-file": args.config_file, "--weights": args.weights}
        given = [*(flag for flag, value in flags.items() if value), *overrides[:1]]
        if given:
            text = f"--model holds its own config, so {given[0]} has no effect; leave it out"
            raise UserError("conflicting-flags", text)
        exported = ExportedPredictor(args.model, trust=args.trust)
        exported.cfg = with_tiles(exported.cfg, args.tile, args.overlap)
        return exported
    args.overrides = overrides
    take_weights(args)
    cfg = with_tiles(read_config_file(args), args.tile, args.overlap)
    least = cfg.model.roi_heads.score_thresh_test
    if args.threshold != AUTO and args.threshold < least:
        print(f"no score will be below MODEL.ROI_HEADS.SCORE_THRESH_TEST, {least:g}: lower it, too")
    return Predictor(cfg)


def keep_listed(paths: list[Path], texts: list[str], truth: Truth) -> list[Path]:
    """Leave out images of folders and patterns that the ground truth does not list."""
    from .inputs import is_video

    named = set(map(Path, texts))
    images = [path for path in paths if not is_video(path)]
    others = {path for path in images if path not in named and not truth.lists(path)}
    if images and len(others) == len(images):
        raise UserError(
            "unlisted-image", f"{truth.path} lists no image of {', '.join(texts[:3])}; give its own images"
        )
    if others:
        print(f"{len(others)} of {len(images)} images are left out: {truth.path} does not list them")
    return [path for path in paths if path not in others]


def make_tasks(named: list[tuple[Path, str]], output: Path, truth: Truth | None) -> list[Task]:
    """Assign numbers to the images, from 1 or as the ground truth does."""
    from ..engine.predict_files import Task

    tasks: list[Task] = []
    by_id: dict[Any, Path] = {}
    for number, (path, name) in enumerate(named, start=1):
        image_id = number if truth is None else truth.image_id_of(path)
        if truth is not None and by_id.setdefault(image_id, path) is not path:
            raise UserError(
                "ambiguous-image",
                f"{path} and {by_id[image_id]} are both image {image_id} of {truth.path}; give one of them",
            )
        objects = None if truth is None else truth.objects[image_id]
        size = None if truth is None else truth.sizes.get(image_id)
        own_id = image_id if truth is None else truth.content.image_ids.get(image_id, image_id)
        tasks.append(Task(path, own_id, output / name, objects, size))
    return tasks


def match_categories(predictor: ImagePredictor, truth: Truth, other_classes: bool) -> list[int | None]:
    """Return the ground truth's category id for each class of the model, None for a class without one.

    Classes are matched by name if the model has names, unless ``other_classes``; the truth may list fewer.
    """
    from ..data import list_names, match_names
    from ..engine.evaluator import OTHER_CLASSES
    from ..engine.predictor import unnamed_classes

    names, known = truth.plain_names, list(predictor.class_names)
    if other_classes or known == unnamed_classes(len(known)):
        if len(names) != len(known):
            raise UserError(
                "num-classes-differ",
                f"{truth.path} has {len(names)} categories ({list_names(names)}), and the model has "
                f"{len(known)} classes; give its own annotations",
            )
        return list(truth.category_ids)
    try:
        places = match_names(names, known)
    except ValueError as error:
        raise UserError(
            "classes-differ",
            f"{truth.path} has the categories {list_names(names)}, and the model was trained on "
            f"{list_names(known)}: {error}; {OTHER_CLASSES}",
        ) from None
    category_ids: list[int | None] = [None] * len(known)
    for place, category_id in zip(places, truth.category_ids, strict=True):
        category_ids[place] = category_id
    left_out = [name for name, i in zip(known, category_ids, strict=True) if i is None]
    if left_out:
        print(f"{truth.path} does not list {list_names(left_out)}: what is found of it is left out")
    return category_ids


def check_replaces_nothing(
    named: list[tuple[Path, str]], found: list[Path], output: Path, args: argparse.Namespace
) -> None:
    """Refuse to write over an input, also one that is left out, or another file that is read."""
    from .inputs import is_video

    others = [args.annotations, args.config_file, args.model]
    read = set(map(os.path.realpath, [*found, *filter(None, others)]))
    videos = [output / name for path, name in named if is_video(path)]
    pictures = [output / name for path, name in named if not (is_video(path) or args.no_pictures)]
    lists = [output / "predictions.json", output / "images.json", *(v.with_suffix(".jsonl") for v in videos)]
    for written in [*pictures, *videos, *lists]:
        if os.path.realpath(written) in read:
            raise UserError(
                "replaced-file",
                f"{written} is an input and would be replaced; choose another --output folder",
            )


def predict_one_video(predictor: ImagePredictor, path: Path, output: Path, **settings: Any) -> Outcome:
    """Predict on a video; one that cannot be read is named and does not stop the others."""
    from ..engine.predict_files import Outcome, predict_video

    try:
        outcome = predict_video(predictor, path, output, **settings)
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        return Outcome(failures=[error])
    print(printable(f"{outcome.objects} objects in {outcome.images} frames of {path}: see {output}"))
    return outcome
