"""Bringing a converted model back to its original's function, with unlabelled images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import GroupNorm
from .anneal import Annealing, statistics_of
from .balance import MAX_SAMPLES, Balance, balance, measure
from .distillation import Distillation, copy_of_state
from .images import ImageStream, digest
from .match import GroupStatistics
from .moments import Run, measure_moments
from .objective import Objective, Outputs, find_blocks, measure_errors, outputs_of_one_input
from .rates import rates_of
from .report import BALANCED, CALIBRATED, CONVERTED, ConversionReport, LayerReport
from .source import SourceNorm, read_norm

ROUNDING = 1e-2
"""Largest relative difference to the original that a change of nothing but scales may make."""


def calibrate(
    original: nn.Module,
    converted: nn.Module,
    images: Tensor | Iterable[Any],
    steps: int = 400,
    *,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    norm_learning_rate: float = 2e-3,
    block_weight: float = 30.0,
    parameters: Literal["all", "affine"] = "all",
    held_out: float = 0.1,
    augment: bool = True,
    rescale: bool = True,
    outputs: Outputs = outputs_of_one_input,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    report: ConversionReport | None = None,
    progress: bool = True,
) -> ConversionReport:
    """Train ``converted`` to give what ``original`` gives, on images without labels.

    First, layer by layer, the channels of the convolutions are rescaled, and the norms matched to that
    (:mod:`gn_detect.convert.balance`): so that the group statistics vary least from image to image, or so
    that all channels have one variance, whichever does better on the held-out images. Then
    the model is distilled. It starts as exactly the original, as its norms use the statistics that
    BatchNorm had; over the first 30% of the steps these are exchanged, by degrees, for each image's own.
    Outputs, blocks and the norms outside blocks are compared. Of the states after that the best on the
    held-out images is kept, or that before the first step, if none is better.

    Both models run in evaluation mode and have their modes and ``requires_grad`` afterwards as before.
    With the same arguments, on the same machine, the result is the same.

    Args:
        original: with BatchNorm; does not change.
        converted: what :func:`convert_norm` made of it with ``init="match"``; changed in place.
        images: (N, C, H, W), or an iterable of images (C, H, W) of one size, of which batches are drawn; or
            an iterable of batches of any kind that the models accept, which are used as they are.
        steps: of the distillation (Adam, warm-up and cosine schedule); 0 only rescales.
        batch_size: images for each step, where ``images`` are single images.
        learning_rate: of the convolutions and all else that is no norm, at its highest; of a layer that the
            first part made smaller or larger in proportion.
        norm_learning_rate: of the weights and biases of the norms that were converted. They are larger than
            convolutions' weights, and few: they mend much before the others learn the images by heart.
        block_weight: of the blocks' differences, on average, beside the outputs'. An image has more to teach
            in its blocks than in its outputs, so that those of other images come closer than with 1.
        parameters: what to train: ``"all"``, or the norms' weights and biases alone (``"affine"``).
        held_out: fraction of the images (at least one batch) that is not trained on.
        augment: flip and crop single images at random; cropping resamples them.
        rescale: do the first part. It is left out for convolutions that differ from the original's.
        outputs: (original, converted, batch) -> pairs of tensors to compare, for models whose outputs on the
            same batch cannot be paired, such as detectors (see ``gn_detect.modeling.paired_outputs``).
        seed: of the order of images and of the augmentation.
        checkpoint: file that is written now and then and at the end, and from which the same calibration goes
            on; of a finished one the result is there at once. For that ``converted`` is made anew, as it was
            given: this function changes it. Delete the file when the result is saved.
        report: of :func:`convert_norm`, to be completed; by default a new one.
        progress: show a bar.

    Returns:
        The report, with each layer's error and the outputs' similarity on the held-out images, before and
        after.

    Raises:
        UserError: too few images, no converted norm with a counterpart in ``original``, a loss that is not
            finite, or a checkpoint of another calibration.
    """
    stream = ImageStream(images, batch_size, held_out, augment, seed)
    # Before anything is changed: that a resumed one starts from the same is all that can be asked.
    given = (
        "" if checkpoint is None else digest([original.state_dict(), converted.state_dict(), *stream.content])
    )
    with _prepared(original, converted, parameters):
        norms = _converted_norms(original, converted)
        sources = _sources(original, norms)
        run = _run_on_one(outputs)
        report = report or _new_report(original, converted, norms)
        by_name = {layer.name: layer for layer in report.layers}

        def compare(stage: str) -> None:
            errors, report.similarity[stage] = measure_errors(
                original, converted, list(norms), stream.held_out, outputs
            )
            for name, error in errors.items():
                if name in by_name:
                    by_name[name].errors[stage] = error

        compare(CONVERTED)
        statistics = _expected_statistics(sources, norms, run, original, stream.some_batches(MAX_SAMPLES))
        blocks = find_blocks(converted, list(norms))
        objective = Objective(original, converted, blocks, outputs, block_weight)
        objective.set_scales(stream.held_out)
        sizes: dict[nn.Module, float] = {}
        kind = "none"
        if rescale:
            try:
                kind, found = _rescale(objective, sources, stream, run)
                statistics |= {norms[name]: balanced.statistics for name, balanced in found.items()}
                sizes = {
                    converted.get_submodule(balanced.layer): balanced.size
                    for balanced in found.values()
                    if balanced.layer is not None
                }
                compare(BALANCED)
            except _NoGain as reason:
                report.warnings.append(f"the channels were not rescaled: {reason}")
        if steps:
            annealing = Annealing(statistics)
            rates = rates_of(converted, list(norms.values()), learning_rate, norm_learning_rate, sizes)
            Distillation(objective, stream, annealing, steps, rates, kind, checkpoint, given, progress).run()
            compare(CALIBRATED)
    return report


def _run_on_one(outputs: Outputs) -> Run:
    """How one model alone is run on a batch."""
    if outputs is outputs_of_one_input:
        return lambda model, batch: model(batch)
    return lambda model, batch: outputs(model, model, batch)


def _converted_norms(original: nn.Module, converted: nn.Module) -> dict[str, GroupNorm]:
    """By name, those whose counterpart in the original is a BatchNorm."""
    before = dict(original.named_modules())
    norms = {
        name: module
        for name, module in converted.named_modules()
        if isinstance(module, GroupNorm) and name in before and read_norm(name, before[name]) is not None
    }
    if not norms:
        raise UserError(
            "no GroupNorm of the converted model has a BatchNorm of the same name in the original; calibrate "
            "what convert_norm returned against the model it was given (not in place)"
        )
    return norms


def _sources(original: nn.Module, norms: dict[str, GroupNorm]) -> dict[str, SourceNorm]:
    modules = dict(original.named_modules())
    found = {name: read_norm(name, modules[name]) for name, norm in norms.items() if norm.affine}
    return {name: source for name, source in found.items() if source is not None}


def _expected_statistics(
    sources: dict[str, SourceNorm], norms: dict[str, GroupNorm], run: Run, original: nn.Module, batches: Any
) -> dict[GroupNorm, GroupStatistics]:
    unknown = [name for name, source in sources.items() if source.mean is None]
    measured = measure_moments(original, unknown, batches, run) if unknown else {}
    found = {
        norms[name]: statistics_of(source, norms[name], measured.get(name))
        for name, source in sources.items()
    }
    return {norm: statistics for norm, statistics in found.items() if statistics is not None}


class _NoGain(Exception):
    """Why the rescaling was undone."""


def _rescale(
    objective: Objective, sources: dict[str, SourceNorm], stream: ImageStream, run: Run
) -> tuple[str, dict[str, Balance]]:
    """The kind of scales that does better on the held-out images, and what :func:`balance` did with them.

    When _NoGain is raised the model is as it was.
    """
    original, converted = objective.original, objective.converted
    before, loss = copy_of_state(converted), objective.output_loss(stream.held_out)
    times = 1 if objective.outputs is outputs_of_one_input else 2
    measured = measure(original, list(sources), run, stream.some_batches(MAX_SAMPLES), times)
    best, state = None, before
    reason = "it would have changed the function"
    for kind, equal in (("varying least", False), ("equal", True)):
        converted.load_state_dict(before)
        found = balance(original, converted, sources, measured, equal=equal)
        if _changes_function(objective, found, stream.held_out[0]):
            continue
        reason = "the outputs on the held-out images did not come closer"
        if (found_loss := objective.output_loss(stream.held_out)) <= loss:
            best, loss, state = (kind, found), found_loss, copy_of_state(converted)
    converted.load_state_dict(state)
    if best is None:
        raise _NoGain(reason)
    return best


def _changes_function(objective: Objective, found: dict[str, Balance], batch: Any) -> bool:
    """Whether the rescaled model with the expected statistics gives something else than the original."""
    modules = dict(objective.converted.named_modules())
    annealing = Annealing({cast(GroupNorm, modules[name]): done.statistics for name, done in found.items()})
    annealing.share = 0.0
    with annealing.applied(), torch.no_grad():
        pairs = objective.outputs(objective.original, objective.converted, batch)
    return max((_relative_error(*pair) for pair in pairs), default=0.0) > ROUNDING


def _relative_error(expected: Tensor, found: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def _new_report(original: nn.Module, converted: nn.Module, norms: dict[str, GroupNorm]) -> ConversionReport:
    report = ConversionReport.of_model(original)
    report.parameters_after = sum(parameter.numel() for parameter in converted.parameters())
    modules = dict(original.named_modules())
    for name, norm in norms.items():
        report.layers.append(LayerReport.of(name, type(modules[name]).__name__, norm, "as given"))
    return report


@contextlib.contextmanager
def _prepared(original: nn.Module, converted: nn.Module, parameters: str) -> Iterator[None]:
    """Evaluation mode, and gradients for what is trained; everything is put back."""
    if parameters not in ("all", "affine"):
        raise UserError(f"parameters is {parameters!r}; choose 'all' or 'affine'")
    models: Sequence[nn.Module] = (original, converted)
    modes = {module: module.training for model in models for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in converted.parameters()}
    affine = {
        parameter
        for module in converted.modules()
        if isinstance(module, GroupNorm)
        for parameter in module.parameters(recurse=False)
    }
    try:
        for model in models:
            model.eval()
        for parameter in trained:
            parameter.requires_grad_(parameters == "all" or parameter in affine)
        with torch.random.fork_rng(), torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, trains in trained.items():
            parameter.requires_grad_(trains)
            parameter.grad = None
