"""Train a source, convert it, fine-tune an arm of it, and test it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_detect import calibrate, convert_norm, load_config
from gn_detect.config import Config
from gn_detect.convert.anneal import Annealing
from gn_detect.convert.match import expected_statistics
from gn_detect.convert.source import read_norm
from gn_detect.data import prepare_image, read_image
from gn_detect.engine.optimizer import learning_rate_factor, set_learning_rate
from gn_detect.engine.run import Run, prepare
from gn_detect.engine.step import seed_iteration, train_step
from gn_detect.evaluation.model import detections_to_coco
from gn_detect.layers import GroupNorm
from gn_detect.modeling import make_model, paired_outputs
from gn_detect.modeling.mask_rcnn import MaskRCNN
from gn_detect.weights import load_weights, norm_settings, save_weights

from . import pretrained
from .arms import PARTS, Arm, Conversion
from .cells import Cell
from .data import Fold, annotations_of, write_annotations
from .matches import Matches, count_objects, match
from .pretrained import Pretrained

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quick" / "nuclei_r18_gn.yaml"

SOURCE_BATCH, SOURCE_RATE = 8, 0.02
SOURCE_ITERATIONS, SMALL_ITERATIONS, CYCLES = 150, 120, 2
CALIBRATION_STEPS, CALIBRATION_BATCH = 150, 2

PARTS_OF_CURVE = 15  # of the training loss; with 150 iterations 10 in each

SMALL: dict[str, Any] = {
    "INPUT.MIN_SIZE_TRAIN": [128],
    "INPUT.MAX_SIZE_TRAIN": 192,
    "INPUT.MIN_SIZE_TEST": 128,
    "INPUT.MAX_SIZE_TEST": 192,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[4], [8], [16], [32], [64]],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 64,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64,
}
"""Half the resolution: a training takes a third of the time, for the search for causes."""


@dataclass(frozen=True)
class Place:
    """Folders and images of one fold.

    Attributes:
        data: folder of dsb2018.
        work: folder of checkpoints and annotation files, which can be made again.
        name: of the fold.
    """

    data: Path
    work: Path
    name: str
    fold: Fold

    def config(self, train: Sequence[str], keys: dict[str, Any]) -> Config:
        """Return the nuclei config with these training images, the fold's test images and further keys."""
        registered = {}
        for dataset, names in (("nuclei_train", train), ("nuclei_val", self.fold.test)):
            part = "test" if dataset == "nuclei_val" else "train" if train is self.fold.train else "source"
            path = self.work / "annotations" / f"{self.name}-{part}.json"
            if not path.exists():
                write_annotations(self.data, names, path)
            registered[dataset] = {"ANNOTATIONS": str(path), "IMAGES": str(self.data / "images")}
        own = {"DATASETS.REGISTER": registered, "MODEL.DEVICE": "cpu"}
        size = SMALL if self.is_small else pretrained.KEYS if self.is_pretrained else {}
        return load_config(CONFIG, []).replace(own | size | keys)

    @property
    def is_small(self) -> bool:
        """Return whether images have half the resolution."""
        return self.name.startswith(("small", "young"))

    @property
    def is_pretrained(self) -> bool:
        """Return whether the source is a backbone of ImageNet."""
        return self.name.startswith("imagenet")

    @cached_property
    def truth(self) -> dict[str, Any]:
        """COCO ground truth of the test images."""
        return annotations_of(self.data, self.fold.test)


def schedule_keys(images: int, rate: float, iterations: int, seed: int) -> dict[str, Any]:
    """Return the keys of a decaying schedule; ``rate`` is that of one image."""
    return {
        "SOLVER.IMS_PER_BATCH": images,
        "SOLVER.BASE_LR": rate * images,
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": sorted({iterations * 7 // 10, iterations * 9 // 10} - {0}),
        "SOLVER.WARMUP_ITERS": iterations // 15,
        "SOLVER.NON_FINITE": "skip",
        "SEED": seed,
    }


def source_weights(place: Place, seed: int) -> Path:
    """Return the checkpoint of a BatchNorm detector, trained from random weights if it is not there."""
    return _cycle(place, seed, 1 if place.name.startswith("young") else CYCLES)


def _cycle(place: Place, seed: int, cycle: int) -> Path:
    """Return the weights after so many cycles of the schedule, each from the weights of the one before."""
    # Folds that differ in fine-tuning alone share a source.
    name = "fluorescence" if place.name.startswith("stained") else place.name.replace("young", "small")
    path = place.work / "sources" / f"{name}-{seed}-{cycle}.pth"
    if not path.exists():
        iterations = SMALL_ITERATIONS if place.is_small else SOURCE_ITERATIONS
        # Another seed for other batches.
        keys = schedule_keys(SOURCE_BATCH, SOURCE_RATE / SOURCE_BATCH, iterations, seed + 1000 * (cycle - 1))
        keys |= Arm(norm="BN").config_keys()
        if cycle > 1:
            keys["MODEL.WEIGHTS"] = str(_cycle(place, seed, cycle - 1))
        run = prepare(place.config(place.fold.source, keys), False)
        for _ in steps(run):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(path, run.model.state_dict(), run.origin())
    return path


def start_weights(place: Place, seed: int, conversion: Conversion | None) -> Path:
    """Return the checkpoint from which an arm is fine-tuned, converted if it is not there."""
    source = source_weights(place, seed)
    if conversion is None:
        return source
    path = place.work / "converted" / f"{source.stem}-{place.name}-{conversion.name}.pth"
    if not path.exists():
        original = original_model(place, seed)
        most, fewest = conversion.groups
        model, report = convert_norm(
            original,
            init="reset" if conversion.start == "reset" else "match",
            num_groups=most,
            min_channels_per_group=fewest,
            relative_eps=conversion.relative_eps,
            include=[PARTS[part][1] for part in conversion.parts],
        )
        if conversion.start in ("balance", "calibrate", "distil"):
            cfg = place.config(place.fold.train, {})
            folder = place.data / "images"
            pictures = [prepare_image(read_image(folder / n, "RGB"), cfg) for n in place.fold.train]
            size = CALIBRATION_BATCH
            calibrate(
                original,
                model,
                [pictures[i : i + size] for i in range(0, len(pictures), size)],
                0 if conversion.start == "balance" else CALIBRATION_STEPS,
                outputs=paired_outputs,
                rescale=conversion.start != "distil",
                report=report,
                progress=False,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(path, model.state_dict(), norm_settings(model))
    return path


def original_model(place: Place, seed: int) -> MaskRCNN:
    """Return the source with its BatchNorm, in evaluation mode."""
    model = make_model(place.config(place.fold.train, Arm(norm="BN").config_keys()))
    load_weights(model, source_weights(place, seed))
    return model.eval()


def fine_tune(place: Place, cell: Cell, arm: Arm | Pretrained) -> dict[str, Any]:
    """Fine-tune an arm, test it, and return the record of the run."""
    if isinstance(arm, Pretrained):
        weights = pretrained.start_weights(place.data, place.work, place.fold.train, arm)
    else:
        weights = start_weights(place, cell.source, arm.conversion)
    begin = time.monotonic()
    keys = schedule_keys(cell.images, cell.rate or 1.0, max(1, cell.iterations), cell.seed)
    keys |= arm.config_keys() | {"MODEL.WEIGHTS": str(weights)}
    run = prepare(place.config(place.fold.train, keys), False)
    losses: list[float] = []
    if cell.iterations:
        with remedies(run, arm, place, cell) as forward:
            losses = list(steps(run, forward))
    trained = time.monotonic()
    found = detect(run, place.truth)
    ap = found.average_precision(count_objects(place.truth)) if is_finite(run.model) else 0.0
    return {
        "AP": round(ap, 2),
        "seconds": round(trained - begin, 1),
        "test seconds": round(time.monotonic() - trained, 1),
        "losses": [round(fmean(part), 4) for part in parts(losses)],
        "matches": found.to_text(),
    }


def parts(values: Sequence[float]) -> list[Sequence[float]]:
    """Return :data:`PARTS_OF_CURVE` parts of a curve, in order; none if it is shorter."""
    size = len(values) // PARTS_OF_CURVE
    return [values[i * size : (i + 1) * size] for i in range(PARTS_OF_CURVE)] if size else []


Forward = Callable[..., dict[str, Tensor]]


def steps(run: Run, forward: Forward | None = None) -> Iterator[float]:
    """Take all steps of a run; yield each step's loss of detection."""
    batches = iter(run.loader)
    for done in range(run.end):
        set_learning_rate(run.state.optimizer, learning_rate_factor(run.cfg, done))
        seed_iteration(run.cfg.seed, done, 0)
        model = run.model if forward is None else forward
        if isinstance(forward, Remedies):
            forward.done = done / run.end
        losses, _ = train_step(run.cfg, cast(nn.Module, model), next(batches), run.state)
        yield sum(float(loss) for name, loss in losses.items() if name != DISTILLATION)


DISTILLATION = "loss_distillation"


class Remedies:
    """A model's losses, with the remedies of an arm; ``done`` is the part of the iterations that are done."""

    def __init__(self, model: MaskRCNN, arm: Arm, original: MaskRCNN, annealing: Annealing) -> None:
        self.model, self.arm, self.original, self.annealing = model, arm, original, annealing
        self.done = 0.0
        self._features: dict[str, Tensor] = {}

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Any]) -> dict[str, Tensor]:
        """Return the losses of a batch."""
        if self.arm.annealed:
            self.annealing.share = min(1.0, self.done / self.arm.annealed)
        losses = self.model.losses(images, targets)
        weight = 1 - self.done / self.arm.distilled if self.arm.distilled else 0.0
        if weight > 0:
            losses[DISTILLATION] = weight * self._distance(images)
        return losses

    def record(self, _: nn.Module, __: Any, output: dict[str, Tensor]) -> None:
        """Keep the backbone's output; a forward hook."""
        self._features = output

    def _distance(self, images: Sequence[Tensor]) -> Tensor:
        """Return the relative squared distance of the FPN's features to the original's."""
        with torch.no_grad():
            wanted = self.original.backbone(self.original.preprocess(images))
        distances = [
            F.mse_loss(self._features[name], value) / value.var().clamp_min(1e-6)
            for name, value in wanted.items()
        ]
        return torch.stack(distances).mean()


@contextmanager
def remedies(run: Run, arm: Arm | Pretrained, place: Place, cell: Cell) -> Iterator[Forward | None]:
    """Yield the forward pass of an arm with remedies, None for one without."""
    if isinstance(arm, Pretrained) or not (arm.scaled_gradients or arm.annealed or arm.distilled):
        yield None
        return
    original = original_model(place, cell.source)
    statistics = {}
    for name, norm in run.model.named_modules():
        if arm.annealed and isinstance(norm, GroupNorm):
            source = read_norm(name, original.get_submodule(name))
            assert source is not None
            expected = expected_statistics(source, norm.num_groups)
            assert expected is not None
            statistics[norm] = expected
    annealing = Annealing(statistics)
    forward = Remedies(run.model, arm, original, annealing)
    with ExitStack() as stack:
        stack.enter_context(annealing.applied())
        handle = run.model.backbone.register_forward_hook(forward.record)
        stack.callback(handle.remove)
        if arm.scaled_gradients:
            for parameter, factor in gradient_factors(run.model, original):
                hook = parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
                stack.callback(hook.remove)
        yield forward


def gradient_factors(model: nn.Module, original: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the square of each output channel's scale relative to ``original``, for each changed weight.

    With W = s V, a step of the rate r along V's gradient moves W as one of the rate r s^2 along its own.
    """
    before = dict(original.named_parameters())
    found = []
    for name, parameter in model.named_parameters():
        other = before.get(name)
        if parameter.dim() < 2 or other is None or torch.equal(parameter, other):
            continue
        size, old = (p.detach().flatten(1).norm(dim=1) for p in (parameter, other))
        factor = (size / old.clamp_min(1e-12)).square()
        found.append((parameter, factor.view(-1, *(1,) * (parameter.dim() - 1))))
    return found


@torch.inference_mode()
def detect(run: Run, truth: dict[str, Any]) -> Matches:
    """Return the matches of the detections on the test images."""
    ((loader, dataset),) = run.tests.values()
    run.model.eval()
    entries = []
    for batch in loader:
        sizes = [sample.original_size for sample in batch]
        found = run.model.detect([sample.image for sample in batch], sizes, paste=False)
        for sample, detections in zip(batch, found, strict=True):
            entries += detections_to_coco(
                detections, sample.image_id, dataset.category_ids, sample.original_size
            )
    return match(truth, entries)


def is_finite(model: nn.Module) -> bool:
    """Return whether all weights are numbers; of a training that diverged AP counts as 0."""
    return all(math.isfinite(float(value.detach().sum())) for value in model.parameters())
