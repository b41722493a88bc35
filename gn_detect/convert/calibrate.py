"""Bring a converted model back to its original's function, with unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import GroupNorm
from .anneal import Annealing
from .balance import MAX_SAMPLES, Balance, balance, measure
from .choose import choose_steps
from .distillation import Distillation, copy_of_state, rates_of
from .images import ImageStream, digest
from .match import Run, evaluation_mode, expected_statistics, measure_moments
from .objective import Objective, Outputs, find_blocks, measure_errors, outputs_of_one_input
from .report import BALANCED, CALIBRATED, CONVERTED, ConversionReport, LayerReport, count_parameters
from .source import SourceNorm, read_norm

ROUNDING = 1e-2  # largest relative difference to the original that a change of scales alone may make


def calibrate(
    original: nn.Module,
    converted: nn.Module,
    images: Tensor | Iterable[Any],
    steps: int | None = None,
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
    """Train ``converted`` to give the outputs of ``original``, on images without labels.

    First, layer by layer, the channels of the convolutions are rescaled, and the norms are matched to the new
    scales (:mod:`gn_detect.convert.balance`). The scales that do better on the held-out images are taken:
    those with which group statistics vary least from image to image, or those that give all channels one
    variance.

    Then the model is distilled. It starts as exactly the original, because its norms use the statistics of
    BatchNorm; over the first 30% of the steps each image's own statistics gradually replace them. Outputs,
    blocks and the norms outside blocks are compared. The state that does best on the held-out images is kept:
    one after these 30%, or the one before the first step.

    Both models run in evaluation mode; their modes and ``requires_grad`` are restored. On one machine the
    same arguments give the same result.

    Args:
        original: the BatchNorm model; it does not change.
        converted: the model that :func:`convert_norm` made of it with ``init="match"``; it is changed.
        images: (N, C, H, W), or an iterable of images (C, H, W) of one size, which are drawn in batches; or
            an iterable of batches of any kind that the models accept.
        steps: number of distillation steps (Adam, warm-up and cosine schedule); 0 only rescales. By default
            30 for each norm, but no more than pass over all images 8 times, and at least 100.
        batch_size: images per step, if ``images`` are single images.
        learning_rate: peak learning rate of all parameters but the norms'. A rescaled layer has it times the
            mean factor of its weights.
        norm_learning_rate: peak learning rate of the converted norms' weights and biases. They are larger
            than convolutions' weights, and few: they adapt before the others overfit to the images.
        block_weight: weight of the blocks' mean difference relative to the outputs'. Blocks hold more
            information about an image than outputs do, so a large weight generalises better than 1.
        parameters: the parameters to train: ``"all"``, or only the norms' (``"affine"``).
        held_out: fraction of the images (at least one batch) that is not trained on.
        augment: flip and crop single images at random; cropping resamples them.
        rescale: do the first part. Convolutions that differ from the original's are left out.
        outputs: (original, converted, batch) -> pairs of tensors to compare, for models whose outputs cannot
            be paired, such as detectors (see :func:`gn_detect.modeling.paired_outputs`).
        seed: decides the order of images and the augmentation.
        checkpoint: file to write the progress to, and to continue from. The same call, with a model that
            :func:`convert_norm` made anew, continues; of a finished calibration it gives the result at once.
            Delete the file when the result is saved.
        report: the report of :func:`convert_norm`, to be completed; by default a new one.
        progress: show a bar.

    Returns:
        The report, with each layer's error and the outputs' similarity on the held-out images, before and
        after.

    Raises:
        UserError: too few images, no converted norm with a counterpart in ``original``, a loss that is not
            finite, or a checkpoint of another calibration.
    """
    stream = ImageStream(images, batch_size, held_out, augment, seed)
    # Taken before anything changes: a calibration that is resumed must start from the same models and images.
    given = (
        "" if checkpoint is None else digest([original.state_dict(), converted.state_dict(), *stream.content])
    )
    with _prepared(original, converted, parameters), _channels_last(original, converted, stream):
        sources = _converted_norms(original, converted)
        norms = {name: cast(GroupNorm, converted.get_submodule(name)) for name in sources}
        if report is None:
            report = ConversionReport(
                [LayerReport.of(n, sources[n].kind, norm, "as given") for n, norm in norms.items()],
                count_parameters(original),
                count_parameters(converted),
            )
        steps = choose_steps(len(norms), stream.batches) if steps is None else steps
        report.steps = steps
        sources = {name: source for name, source in sources.items() if norms[name].affine}
        by_name = {layer.name: layer for layer in report.layers}

        def run(model: nn.Module, batch: Any) -> Any:
            return model(batch) if outputs is outputs_of_one_input else outputs(model, model, batch)

        def compare(stage: str) -> None:
            errors, report.similarity[stage] = measure_errors(
                original, converted, list(norms), stream.held_out, outputs
            )
            for name, error in errors.items():
                if name in by_name:
                    by_name[name].errors[stage] = error

        compare(CONVERTED)
        unknown = [name for name, source in sources.items() if source.mean is None]
        samples = stream.some_batches(MAX_SAMPLES)
        measured = measure_moments(original, unknown, samples, run) if unknown else {}
        expected = {
            norms[name]: expected_statistics(source, norms[name].num_groups, measured.get(name))
            for name, source in sources.items()
        }
        statistics = {norm: found for norm, found in expected.items() if found is not None}
        blocks = find_blocks(converted, list(norms))
        objective = Objective(original, converted, blocks, outputs, block_weight, stream.held_out)
        kind = "none"
        sizes: dict[nn.Module, float] = {}
        if rescale:
            kind, found, reason = _rescale(objective, sources, stream, run)
            statistics |= {norms[name]: balanced.statistics for name, balanced in found.items()}
            sizes = {converted.get_submodule(b.layer): b.size for b in found.values() if b.layer is not None}
            if reason:
                report.warnings.append(f"the channels were not rescaled: {reason}")
            else:
                compare(BALANCED)
        if steps:
            rates = rates_of(converted, list(norms.values()), learning_rate, norm_learning_rate, sizes)
            path = None if checkpoint is None else Path(checkpoint)
            Distillation(
                objective, stream, Annealing(statistics), steps, rates, kind, path, given, progress
            ).run()
            compare(CALIBRATED)
    return report


def _converted_norms(original: nn.Module, converted: nn.Module) -> dict[str, SourceNorm]:
    """Return the original's norms, by name, that are GroupNorms in the converted model."""
    before = dict(original.named_modules())
    found = {
        name: read_norm(name, before[name])
        for name, module in converted.named_modules()
        if isinstance(module, GroupNorm) and name in before
    }
    norms = {name: norm for name, norm in found.items() if norm is not None}
    if not norms:
        raise UserError(
            "no-batchnorm",
            "no GroupNorm of the converted model has a BatchNorm of the same name in the original; calibrate "
            "what convert_norm returned against the model it was given (not in place)",
        )
    return norms


def _rescale(
    objective: Objective, sources: dict[str, SourceNorm], stream: ImageStream, run: Run
) -> tuple[str, dict[str, Balance], str]:
    """Rescale the channels, if that brings the outputs on the held-out images closer.

    Returns:
        The kind of scales, the result of :func:`balance`, and the reason why the model is unchanged, if so.
    """
    original, converted = objective.original, objective.converted
    before = state = copy_of_state(converted)
    smallest = objective.output_loss(stream.held_out)
    times = 1 if objective.outputs is outputs_of_one_input else 2
    measured = measure(original, list(sources), run, stream.some_batches(MAX_SAMPLES), times)
    best_kind, reason = "none", "it would have changed the function"
    best: dict[str, Balance] = {}
    for kind, equal in (("varying least", False), ("equal", True)):
        converted.load_state_dict(before)
        found = balance(original, converted, sources, measured, equal=equal)
        if _changes_function(objective, found, stream.held_out[0]):
            continue
        reason = "the outputs on the held-out images did not come closer"
        if (loss := objective.output_loss(stream.held_out)) <= smallest:
            best_kind, best, smallest, state = kind, found, loss, copy_of_state(converted)
    converted.load_state_dict(state)
    return best_kind, best, "" if best_kind != "none" else reason


def _changes_function(objective: Objective, found: dict[str, Balance], batch: Any) -> bool:
    """Return True if the model differs from the original although its norms use expected statistics."""
    modules = dict(objective.converted.named_modules())
    norms = {cast(GroupNorm, modules[name]): balanced.statistics for name, balanced in found.items()}
    with Annealing(norms, share=0.0).applied(), torch.no_grad():
        pairs = objective.outputs(objective.original, objective.converted, batch)
    differences = [
        (b - a).norm() / a.norm().clamp_min(1e-12) if a.numel() else torch.zeros(()) for a, b in pairs
    ]
    return max((difference.item() for difference in differences), default=0.0) > ROUNDING


@contextmanager
def _channels_last(original: nn.Module, converted: nn.Module, stream: ImageStream) -> Iterator[None]:
    """Hold the convolutions' weights channels-last, with which single images take less time on a CPU."""
    weights = [
        parameter
        for model in (original, converted)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if stream.on_cpu and isinstance(module, nn.Conv2d) and parameter.dim() == 4
        if parameter.is_contiguous()
    ]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


@contextmanager
def _prepared(original: nn.Module, converted: nn.Module, parameters: str) -> Iterator[None]:
    """Set evaluation mode, and require gradients for the parameters to train; restore both afterwards."""
    if parameters not in ("all", "affine"):
        raise UserError("bad-argument", f"parameters is {parameters!r}; choose 'all' or 'affine'")
    trained = {parameter: parameter.requires_grad for parameter in converted.parameters()}
    affine = {
        parameter
        for module in converted.modules()
        if isinstance(module, GroupNorm)
        for parameter in module.parameters(recurse=False)
    }
    try:
        for parameter in trained:
            parameter.requires_grad_(parameters == "all" or parameter in affine)
        with evaluation_mode(original, converted), torch.random.fork_rng(), torch.enable_grad():
            yield
    finally:
        for parameter, trains in trained.items():
            parameter.requires_grad_(trains)
            parameter.grad = None
