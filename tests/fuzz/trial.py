"""One damaged file put through all that training and evaluation do with it, and through the doctor."""

from __future__ import annotations

import io
import logging
import math
import re
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gn_detect.cli.main import main
from gn_detect.config import Config
from gn_detect.data import CocoDataset, DatasetSource, build_train_loader
from gn_detect.data.coco.faults import ERROR, NOTE
from gn_detect.data.doctor.report import Diagnosis, examine
from gn_detect.errors import UserError
from gn_detect.evaluation import evaluate_results
from gn_detect.files import atomic_write_json
from gn_detect.modeling.mask_rcnn import MaskRCNN
from gn_detect.structures import Sample
from tests.fuzz.annotations import Content, changed_ids

SECONDS = 20
"""Processor seconds after which a case counts as hanging; other work on the machine does not count."""

PATIENCE = 15
"""Times as many seconds of the clock, for a case that waits, or that no alarm interrupts."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, or that a line of text cannot hold; a tab, a newline and a return can."""


class Hang(BaseException):
    """Raised by the alarm clock."""


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """End the block after so many seconds of the processor, or :data:`PATIENCE` times as many in all."""

    def ring(*_: Any) -> None:
        raise Hang

    clocks = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE * seconds),
    }
    before = {number: signal.signal(number, ring) for number in clocks}
    for clock, most in clocks.values():
        signal.setitimer(clock, most)
    try:
        yield
    finally:
        for clock, _ in clocks.values():
            signal.setitimer(clock, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Tally:
    """What happened in many cases; the lists hold seeds and reasons.

    Attributes:
        cases, refused, named, passed, repaired: numbers of cases.
        failures: each reason why a case is not as it should be; tracebacks are among them.
        places: by exception and place of a traceback, the labels of its cases.
        slow, large: labels of cases over the limit of time, or of memory, which :mod:`.limits` measures.
        unnamed: refused, but the doctor does not say what was damaged.
        commands: command lines that were run.
        seconds: the limit of the processor's time for whatever is attempted.
    """

    cases: int = 0
    refused: int = 0
    named: int = 0
    passed: int = 0
    repaired: int = 0
    failures: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)
    large: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    commands: int = 0
    seconds: int = SECONDS

    @property
    def tracebacks(self) -> int:
        """Their number, the same ones of several cases counted for each."""
        return sum(map(len, self.places.values()))

    def add(self, other: Tally) -> None:
        """The cases of another process."""
        for name in ("cases", "refused", "named", "passed", "repaired", "commands"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("failures", "slow", "large", "unnamed"):
            getattr(self, name).extend(getattr(other, name))
        for place, labels in other.places.items():
            self.places.setdefault(place, []).extend(labels)

    def attempt(self, label: str, function: Any, *arguments: Any) -> Any:
        """The result or UserError; anything else that is raised is a failure, and gives None."""
        try:
            with alarm(self.seconds):
                return function(*arguments)
        except UserError as error:
            if not str(error) or "\n" in str(error):
                self.failures.append(f"{label}: a message that is not one line: {str(error)!r}")
            return error
        except Hang:
            self.slow.append(label)
            self.failures.append(f"{label}: no end after {self.seconds} s in {function.__name__}")
        except Exception as error:
            self._note(label, error)
        return None

    def command(self, label: str, *words: str) -> int | None:
        """A command line, as a user gives it; its exit status, or None after a traceback.

        A refusal is one line on standard error, and nothing that is printed can steer a terminal.
        """
        printed = io.StringIO()
        self.commands += 1
        logging.disable(logging.NOTSET)
        with redirect_stdout(printed), redirect_stderr(printed):
            status = self.attempt(f"{label}: gn-detect {' '.join(words)}", main, words)
        logging.disable(logging.WARNING)
        text = printed.getvalue()
        if status == 2 and (text.count("error: ") < 1 or not text.splitlines()[-1].startswith("error: ")):
            self.failures.append(f"{label}: no line of error: {text[-300:]!r}")
        if found := _CONTROL.search(text):
            near = text[max(0, found.start() - 60) : found.end() + 20]
            self.failures.append(f"{label}: {words[0]} prints a control character: {near!r}")
        return status if isinstance(status, int) else None

    def _note(self, label: str, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/gn_detect/" in frame.filename] or list(frames)
        path = own[-1].filename.rpartition("/gn_detect/")[2]
        place = f"{type(error).__name__} in {path}, {own[-1].name}: {own[-1].line}"
        self.places.setdefault(place, []).append(label)
        self.failures.append(f"{label}: {''.join(traceback.format_exception(error, limit=-4))}")


class AnnotationTrial:
    """Tries annotation files on one set of images.

    Args:
        folder: with ``images``; files are written beside it.
        cfg: of a tiny model, whose dataset is ``folder/annotations.json``.
        model: built from it.
    """

    def __init__(self, folder: Path, base: Content, cfg: Config, model: MaskRCNN) -> None:
        self.folder, self.base, self.cfg, self.model = folder, base, cfg, model
        self.file = folder / "annotations.json"
        self.source = DatasetSource("fuzz", self.file, folder / "images")
        self.tally = Tally()

    def run(self, label: str, text: str | bytes) -> None:
        """Train a step, evaluate, ask the doctor, and repair."""
        tally = self.tally
        tally.cases += 1
        self.file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        outcome = tally.attempt(label, self.use)
        diagnosis = tally.attempt(label, examine, [self.source])
        if isinstance(diagnosis, Diagnosis):
            tally.attempt(label, lambda: (str(diagnosis), diagnosis.as_json()))
        if isinstance(outcome, UserError):
            tally.refused += 1
            if self.names(diagnosis, text):
                tally.named += 1
            else:
                tally.unnamed.append(f"{label}: {outcome}")
        elif outcome is not None:
            tally.passed += 1
            tally.failures += [f"{label}: wrong success: {reason}" for reason in outcome]
            if isinstance(diagnosis, Diagnosis) and any(f.severity == ERROR for f in diagnosis.findings):
                error = next(f for f in diagnosis.findings if f.severity == ERROR)
                tally.failures.append(f"{label}: the doctor sees an error where training works: {error}")
        if isinstance(diagnosis, Diagnosis):
            self.repair(label, diagnosis)

    def use(self) -> list[str]:
        """Every image as training reads it, a loss, an evaluation; returns what is wrong with the result."""
        loader, dataset = build_train_loader(self.cfg)
        wrong = []
        samples = [loader.samples[i, i] for i in range(len(dataset))]
        for sample in samples:
            wrong += _wrong_with(sample, len(dataset.class_names))
        if wrong:
            return wrong
        some = [s for s in samples if s.target is not None and len(s.target)][:2]
        if len(dataset.class_names) == self.cfg.model.roi_heads.num_classes and some:
            with torch.no_grad():
                losses = self.model([s.image for s in some], [s.target for s in some])
            wrong += [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        CocoDataset(self.source, evaluation=True)
        for kind in ("bbox", "segm"):
            evaluate_results(self.file, [], kind)
        return wrong

    def names(self, diagnosis: Any, text: str | bytes) -> bool:
        """Whether the doctor names an entry that was changed, as an error or a warning."""
        changed = changed_ids(self.base, text)
        if isinstance(diagnosis, UserError):
            return str(self.file) in str(diagnosis)  # the file as a whole
        if not isinstance(diagnosis, Diagnosis) or changed is None:
            return False
        for finding in diagnosis.findings:
            about = {
                "annotations": finding.annotation_id,
                "images": finding.image_id,
                "categories": finding.category_id,
            }
            if finding.severity != NOTE and any(
                about[key] in ids or any(isinstance(i, str) and i in finding.detail for i in ids)
                for key, ids in changed.items()
            ):
                return True
            if finding.severity == ERROR and not any(isinstance(value, int) for value in about.values()):
                return True  # the file as a whole
            if finding.kind == "boxes-alone":
                return True
        return False

    def repair(self, label: str, diagnosis: Diagnosis) -> None:
        """The repaired copy must be read, unless nothing is left of it, and what is gone must be listed."""
        fix = diagnosis.fix
        for key, count in fix.before.items():
            if len(fix.content[key]) + len(fix.removed[key]) != count:
                self.tally.failures.append(f"{label}: {key} are gone that no removal names")
        if self.tally.attempt(label, fix.check, diagnosis.parts[0].rules, True) is None:
            atomic_write_json(self.file, fix.content)
            if not any(not a["iscrowd"] for a in fix.content["annotations"]):
                return  # nothing to train on, before and after
            outcome = self.tally.attempt(label, self.use)
            boxes_alone = "boxes-alone" in diagnosis.kinds() and isinstance(outcome, UserError)
            if outcome == [] or (boxes_alone and "set MODEL.MASK_ON False" in str(outcome)):
                self.tally.repaired += 1
            else:
                self.tally.failures.append(f"{label}: repaired, but {outcome}; {fix.changes}")


def _wrong_with(sample: Sample, classes: int) -> list[str]:
    target, wrong = sample.target, []
    assert target is not None
    assert target.masks is not None
    height, width = sample.image.shape[1:]
    boxes, labels = target.boxes, target.labels
    if not torch.isfinite(boxes).all() or (boxes < 0).any():
        wrong.append(f"boxes {boxes.tolist()}")
    if (boxes[:, 2] > width).any() or (boxes[:, 3] > height).any() or (boxes[:, 2:] <= boxes[:, :2]).any():
        wrong.append(f"boxes {boxes.tolist()} in {width}x{height}")
    if ((labels < 0) | (labels >= classes)).any() or len(target.masks) != len(labels):
        wrong.append(f"labels {labels.tolist()}, {len(target.masks)} masks")
    for mask in target.masks:
        if isinstance(mask, torch.Tensor) and mask.shape != (height, width):
            wrong.append(f"a mask of {tuple(mask.shape)}")
    return wrong
