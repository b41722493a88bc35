"""Compare a converted model with its original: outputs, blocks and norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .match import RunningMoments

Pairs = list[tuple[Tensor, Tensor]]  # of the original's tensor, without gradient, and the other model's
Outputs = Callable[[nn.Module, nn.Module, Any], Pairs]  # (original, converted, batch) -> pairs

LARGEST_BLOCK = 8  # norms; a module with more, such as the one sequence of a VGG, is a network


def outputs_of_one_input(original: nn.Module, converted: nn.Module, batch: Any) -> Pairs:
    """Return pairs of the tensors that the models give for the batch, in any tuples, lists and dicts."""
    with torch.no_grad():
        expected = _tensors(original(batch))
    return list(zip(expected, _tensors(converted(batch)), strict=True))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


def find_blocks(model: nn.Module, norms: Sequence[str]) -> list[str]:
    """Return the modules to compare: the smallest with two norms or more, and the norms outside them.

    These are the residual blocks of a ResNet, the inverted ones of a MobileNet, the branches of an Inception.
    If a module only wraps another with the same norms, the outer one counts, as it adds the shortcut.
    """
    inside: dict[frozenset[str], str] = {}
    for name, _ in model.named_modules():
        held = frozenset(norm for norm in norms if norm.startswith(f"{name}.") or not name)
        if 2 <= len(held) <= LARGEST_BLOCK:
            inside.setdefault(held, name)
    smallest = {held: name for held, name in inside.items() if not any(other < held for other in inside)}
    covered = {norm for held in smallest for norm in held}
    return [name for name in smallest.values() if name] + [
        _output_of_norm(model, norm) for norm in norms if norm not in covered
    ]


def _output_of_norm(model: nn.Module, norm: str) -> str:
    """Return the module whose output is that norm's.

    detectron2's ``Conv2d`` and ours hold a norm. They apply their activation as part of a GroupNorm, but
    after a BatchNorm; so only the convolution's output is comparable.
    """
    parent = norm.rpartition(".")[0]
    return parent if parent and isinstance(model.get_submodule(parent), nn.Conv2d) else norm


class Objective:
    """The mean of the outputs' relative squared differences, plus the weighted mean of the blocks'.

    Each difference is divided by the variance of the original's values on ``held_out``, so that layers count
    alike.

    Raises:
        UserError: batches differ in the number of outputs, or have none.
    """

    @torch.no_grad()
    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        blocks: Sequence[str],
        outputs: Outputs,
        block_weight: float,
        held_out: Sequence[Any],
    ) -> None:
        self.original, self.converted, self.outputs = original, converted, outputs
        self._blocks, self.block_weight = blocks, block_weight
        block_moments = {name: RunningMoments() for name in blocks}
        output_moments: list[RunningMoments] = []
        for batch in held_out:
            pairs, compared = self._forward(batch)
            for name, found in compared.items():
                for expected, _ in found:
                    block_moments[name].add(_with_channels(expected))
            output_moments = output_moments or [RunningMoments() for _ in pairs]
            if not pairs or len(pairs) != len(output_moments):
                raise UserError(
                    "calibration-images",
                    f"a batch has {len(pairs)} outputs to compare, and the first had {len(output_moments)}: "
                    "the models must return tensors, as many for each batch; give outputs=, which pairs them",
                )
            for moments, (expected, _) in zip(output_moments, pairs, strict=True):
                if expected.numel():
                    moments.add(_with_channels(expected))
        self._block_scales = {name: _variance(found) for name, found in block_moments.items() if found.count}
        self._output_scales = [_variance(found) for found in output_moments]

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the loss of the outputs and that of the blocks."""
        pairs, compared = self._forward(batch)
        output = torch.zeros((), device=pairs[0][0].device)
        for (expected, found), scale in zip(pairs, self._output_scales, strict=True):
            if expected.numel():
                output = output + F.mse_loss(found, expected) / scale
        block = torch.zeros_like(output)
        for name, scale in self._block_scales.items():
            for expected, found in compared.get(name, []):
                block = block + F.mse_loss(found, expected) / scale / len(self._block_scales)
        return output / len(pairs), self.block_weight * block

    @torch.no_grad()
    def output_loss(self, batches: Sequence[Any]) -> float:
        """Return the mean loss of the outputs."""
        return torch.stack([self.loss(batch)[0] for batch in batches]).mean().item()

    def _forward(self, batch: Any) -> tuple[Pairs, dict[str, Pairs]]:
        return _compare(self.original, self.converted, self._blocks, self.outputs, batch)


def _compare(
    original: nn.Module,
    converted: nn.Module,
    names: Sequence[str],
    outputs: Outputs,
    batch: Any,
    copies: bool = False,
) -> tuple[Pairs, dict[str, Pairs]]:
    """Run both models, and return pairs of their outputs, and by name pairs of the named modules' outputs.

    A ReLU in place changes a module's output afterwards, unless ``copies`` are taken.
    """
    recorded: list[dict[str, list[Tensor]]] = []
    with ExitStack() as hooks:
        for model in (original, converted):
            found: dict[str, list[Tensor]] = {name: [] for name in names}
            recorded.append(found)
            for name, calls in found.items():

                def record(_: nn.Module, __: Any, output: Any, calls: list[Tensor] = calls) -> None:
                    if isinstance(output, Tensor):
                        calls.append(output.clone() if copies else output)

                hooks.enter_context(model.get_submodule(name).register_forward_hook(record))
        pairs = outputs(original, converted, batch)
    ours, theirs = recorded
    same = [name for name in names if len(ours[name]) == len(theirs[name])]
    return pairs, {name: list(zip(ours[name], theirs[name], strict=True)) for name in same}


@torch.no_grad()
def measure_errors(
    original: nn.Module,
    converted: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    outputs: Outputs,
) -> tuple[dict[str, float], float]:
    """Return the relative error of each named norm's output, and the mean cosine of the models' outputs.

    An error is the root mean square of the difference, as a fraction of the standard deviation of the
    original's values about their channels' means.
    """
    tapped = {name: _output_of_norm(original, name) for name in names}
    taps = list(dict.fromkeys(tapped.values()))
    squares = dict.fromkeys(taps, 0.0)
    moments = {name: RunningMoments() for name in taps}
    cosines: list[Tensor] = []
    for batch in batches:
        pairs, compared = _compare(original, converted, taps, outputs, batch, copies=True)
        for name, found in compared.items():
            for a, b in found:
                if a.shape == b.shape and a.numel():
                    squares[name] += (b.double() - a.double()).square().sum(dtype=torch.float64).item()
                    moments[name].add(_with_channels(a))
        for a, b in pairs:
            if a.numel():
                a, b = _with_channels(a).flatten(1), _with_channels(b).flatten(1)
                cosines.append(torch.cosine_similarity(a.double(), b.double()).cpu())
    errors = {}
    for name, tap in tapped.items():
        if moments[tap].count:
            total = moments[tap].result()[1].sum().item() * moments[tap].count
            errors[name] = (squares[tap] / max(total, 1e-30)) ** 0.5
    return errors, torch.cat(cosines).mean().item() if cosines else float("nan")


def _with_channels(x: Tensor) -> Tensor:
    return x if x.dim() >= 2 else x.reshape(-1, 1)


def _variance(moments: RunningMoments) -> float:
    return max(moments.result()[1].mean().item(), 1e-12) if moments.count else 1.0
