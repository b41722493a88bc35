"""What a conversion did, for people, for programs and as a picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..files import atomic_write, atomic_write_json
from ..text import printable

CONVERTED, BALANCED, CALIBRATED = "converted", "balanced", "calibrated"
"""The stages at which errors and similarity are measured."""

COPIED = "copy, no statistics"
"""How a norm without running statistics is initialised where it should be matched."""

_SERIES = ((CONVERTED, "#d9822b"), (BALANCED, "#2e9e5b"), (CALIBRATED, "#1f6feb"))


@dataclass
class LayerReport:
    """One norm.

    Attributes:
        name, kind: of the module that was replaced, and its class.
        channels, groups, eps: of the new one.
        init: how its weight and bias were found.
        trainable: whether they ask for gradients.
        constant: number of channels that hardly vary in the original, and are constants in the new one.
        errors: by stage, the root mean square of the difference to the original's output, as a fraction of
            the standard deviation of that output; filled by :func:`gn_detect.calibrate`.
    """

    name: str
    kind: str
    channels: int
    groups: int
    eps: float
    init: str
    trainable: bool
    constant: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, kind: str, new: nn.GroupNorm, init: str) -> LayerReport:
        """The report of ``new`` in the place of a ``kind``."""
        trainable = any(parameter.requires_grad for parameter in new.parameters(recurse=False))
        return cls(name, kind, new.num_channels, new.num_groups, new.eps, init, trainable)


@dataclass
class ConversionReport:
    """What became of each norm; ``str`` gives a table.

    Attributes:
        layers: in the order of the model.
        parameters_before, parameters_after: number of values in the model's parameters.
        similarity: by stage, mean cosine between the original's outputs and the converted model's.
        warnings: what a user should know.
    """

    layers: list[LayerReport] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    similarity: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of_model(cls, model: nn.Module) -> ConversionReport:
        """An empty report that knows the size of the model."""
        size = count_parameters(model)
        return cls(parameters_before=size, parameters_after=size)

    def warn_of_layers(self) -> None:
        """Add what the layers tell that a user should know."""
        if copied := [layer.name for layer in self.layers if layer.init == COPIED]:
            self.warnings.append(
                f"{len(copied)} norms, from '{copied[0]}' on, hold no running statistics (as Caffe2's, whose "
                "are folded, and fresh ones), so their weight, bias and eps were copied; give images to "
                "measure them (images=; gn-detect convert --config-file FILE --images FOLDER)"
            )
        if lone := [n for n in self.layers if "BatchNorm1d" in n.kind and n.groups == n.channels]:
            self.warnings.append(
                f"{len(lone)} norms, such as '{lone[0].name}', have groups of one channel, which would "
                "normalise single numbers of an input (N, C), which gives constants; take fewer groups"
            )
        if constant := [layer for layer in self.layers if layer.constant]:
            self.warnings.append(
                f"{sum(layer.constant for layer in constant)} channels in {len(constant)} norms, from "
                f"'{constant[0].name}' on, hardly vary in the original (their variance is next to nothing "
                "beside its eps), so they start as constants: weight 0 and the original's bias"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        atomic_write_json(path, self.to_dict(), indent=2)

    def draw(self, path: str | Path) -> None:
        """Write a picture (PNG, SVG or PDF, by the ending): each layer's error by depth, at each stage."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.5), layout="constrained")
        axes = figure.add_subplot()
        depth = range(1, len(self.layers) + 1)
        for stage, colour in _SERIES:
            errors = [layer.errors.get(stage, float("nan")) for layer in self.layers]
            if stage in self.similarity:
                label = f"{stage}: outputs' cosine {self.similarity[stage]:.3f}"
                axes.plot(depth, errors, "o-", color=colour, label=label, markersize=4)
        axes.set(xlabel="norm, from input to output", ylabel="error / standard deviation of the output")
        axes.set_title("How far each layer is from the BatchNorm model")
        axes.set_yscale("log")  # a single layer can be ten times as far as the others
        axes.grid(alpha=0.3, which="both")
        if self.similarity:
            axes.legend()
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=Path(path).suffix.lstrip(".") or "png", dpi=120)

    def __str__(self) -> str:
        stages = [stage for stage, _ in _SERIES if any(stage in layer.errors for layer in self.layers)]
        header = ["layer", "was", "C", "groups", "eps", "init", "trains", *(f"error {s}" for s in stages)]
        rows = [header] + [_row(layer, stages) for layer in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        sizes = f"{self.parameters_before} parameters before, {self.parameters_after} after"
        lines.append(f"{len(self.layers)} norms; {sizes}")
        lines += [f"outputs' cosine with the original, {s}: {c:.4f}" for s, c in self.similarity.items()]
        lines += [f"warning: {printable(warning)}" for warning in self.warnings]
        return "\n".join(lines)


def count_parameters(model: nn.Module) -> int:
    """Values in the parameters; an uninitialised lazy one has no size."""
    return sum(0 if nn.parameter.is_lazy(p) else p.numel() for p in model.parameters())


def _row(layer: LayerReport, stages: list[str]) -> list[str]:
    errors = [f"{layer.errors[stage]:.3f}" if stage in layer.errors else "" for stage in stages]
    known = [layer.name or "(the model)", layer.kind, str(layer.channels), str(layer.groups)]
    known = [printable(cell) for cell in known]
    return [*known, f"{layer.eps:g}", layer.init, "yes" if layer.trainable else "no", *errors]
