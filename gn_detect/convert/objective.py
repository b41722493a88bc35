"""How far a converted model is from its original: in its outputs, its blocks and its norms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .moments import RunningMoments

Outputs = Callable[[nn.Module, nn.Module, Any], list[tuple[Tensor, Tensor]]]
"""Of (original, converted, batch): pairs of the original's tensor, without gradient, and the other's."""

LARGEST_BLOCK = 8
"""Norms; a module with more, such as the one sequence of a VGG, is no block but a network."""


def outputs_of_one_input(
    original: nn.Module, converted: nn.Module, batch: Any
) -> list[tuple[Tensor, Tensor]]:
    """Each tensor that the models return for the batch; they may come in tuples, lists and dicts."""
    with torch.no_grad():
        expected = _tensors(original(batch))
    return list(zip(expected, _tensors(converted(batch)), strict=True))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def find_blocks(model: nn.Module, norms: Sequence[str]) -> list[str]:
    """Names of the modules to compare: the smallest that hold two norms or more, and the norms outside them.

    Those are the residual blocks of a ResNet, the inverted ones of a MobileNet, the branches of an
    Inception. Where one module only wraps another with the same norms, the outer one counts, as it adds the
    shortcut.
    """
    inside: dict[frozenset[str], str] = {}
    for name, _ in model.named_modules():
        held = frozenset(norm for norm in norms if norm.startswith(f"{name}.") or not name)
        if 2 <= len(held) <= LARGEST_BLOCK:
            inside.setdefault(held, name)
    smallest = {held: name for held, name in inside.items() if not any(other < held for other in inside)}
    covered = {norm for held in smallest for norm in held}
    return [name for name in smallest.values() if name] + [
        outputs_of_norm(model, norm) for norm in norms if norm not in covered
    ]


def outputs_of_norm(model: nn.Module, norm: str) -> str:
    """Name of the module whose output is that norm's.

    detectron2's ``Conv2d`` and ours hold a norm, and apply what follows it together with a GroupNorm but
    after a BatchNorm; there only the convolution's output is comparable.
    """
    parent = norm.rpartition(".")[0]
    return parent if parent and isinstance(model.get_submodule(parent), nn.Conv2d) else norm


class Objective:
    """The sum of relative squared differences of outputs and, on average and weighted, blocks.

    Each difference is divided by the variance of the original's values, so that layers count alike.
    """

    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        blocks: Sequence[str],
        outputs: Outputs,
        block_weight: float,
    ) -> None:
        self.original, self.converted, self.outputs = original, converted, outputs
        self.blocks, self.block_weight = blocks, block_weight
        self._block_scales: dict[str, float] = {}
        self._output_scales: list[float] = []

    @torch.no_grad()
    def set_scales(self, batches: Sequence[Any]) -> None:
        """Measure the variances of the original's outputs and blocks."""
        blocks = {name: RunningMoments() for name in self.blocks}
        outputs: list[RunningMoments] = []
        for batch in batches:
            pairs, compared = self._forward(batch)
            for name, found in compared.items():
                for expected, _ in found:
                    blocks[name].add(_with_channels(expected))
            outputs = outputs or [RunningMoments() for _ in pairs]
            if not pairs or len(pairs) != len(outputs):
                raise UserError(
                    f"a batch has {len(pairs)} outputs to compare, and the first had {len(outputs)}: the "
                    "models must return tensors, as many for each batch; give outputs=, which pairs them"
                )
            for moments, (expected, _) in zip(outputs, pairs, strict=True):
                if expected.numel():
                    moments.add(_with_channels(expected))
        self._block_scales = {name: _variance(moments) for name, moments in blocks.items() if moments.count}
        self._output_scales = [_variance(moments) for moments in outputs]

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Of the outputs and of the blocks; the gradient reaches the converted model's parameters."""
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
        """Mean over the batches, of the outputs alone."""
        return torch.stack([self.loss(batch)[0] for batch in batches]).mean().item()

    def _forward(
        self, batch: Any
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, list[tuple[Tensor, Tensor]]]]:
        with recorded(self.original, self.blocks) as ours, recorded(self.converted, self.blocks) as theirs:
            pairs = self.outputs(self.original, self.converted, batch)
        compared = {
            name: list(zip(ours[name], theirs[name], strict=True))
            for name in self.blocks
            if len(ours[name]) == len(theirs[name])
        }
        return pairs, compared


@contextlib.contextmanager
def recorded(
    model: nn.Module, names: Sequence[str], *, copies: bool = False
) -> Iterator[dict[str, list[Tensor]]]:
    """The outputs, where they are tensors, of each call of the named modules.

    What follows in place, such as a ReLU, changes the recorded tensor too, unless it is a copy.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:

        def record(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                found[name].append(output.clone() if copies else output)

        handles.append(model.get_submodule(name).register_forward_hook(record))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_errors(
    original: nn.Module,
    converted: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    outputs: Outputs,
) -> tuple[dict[str, float], float]:
    """Relative error of each named layer's output, and the mean cosine of the models' outputs.

    A layer's error is the root mean square of the difference, as a fraction of the standard deviation of
    the original's values about their channels' means.
    """
    tapped = {name: outputs_of_norm(original, name) for name in names}
    taps = list(dict.fromkeys(tapped.values()))
    squares = dict.fromkeys(taps, 0.0)
    moments = {name: RunningMoments() for name in taps}
    cosines: list[Tensor] = []
    for batch in batches:
        with (
            recorded(original, taps, copies=True) as expected,
            recorded(converted, taps, copies=True) as found,
        ):
            pairs = outputs(original, converted, batch)
        for name in taps:
            for a, b in zip(expected[name], found[name], strict=False):
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
    """At least (N, C)."""
    return x if x.dim() >= 2 else x.reshape(-1, 1)


def _variance(moments: RunningMoments) -> float:
    if not moments.count:
        return 1.0
    return max(moments.result()[1].mean().item(), 1e-12)
