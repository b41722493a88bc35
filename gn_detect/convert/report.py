"""The report of a conversion: a table for people, JSON for programs, and a picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..files import atomic_write, atomic_write_json
from ..text import printable

# The stages after which errors and similarity are measured, with their colours.
CONVERTED, BALANCED, CALIBRATED = "converted", "balanced", "calibrated"
_COLOURS = {CONVERTED: "#d9822b", BALANCED: "#2e9e5b", CALIBRATED: "#1f6feb"}

COPIED = "copy, no statistics"  # the ``init`` of a norm without statistics that should be matched


@dataclass
class LayerReport:
    """One converted norm.

    Attributes:
        kind: class of the module that was replaced.
        init: origin of the weight and bias.
        trainable: they require gradients.
        constant: number of channels that hardly vary in the original, and are constants in the new norm.
        errors: by stage, the root mean square of the difference to the original's output, as a fraction of
            the standard deviation of that output; :func:`gn_detect.calibrate` measures it.
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
        """Return the report of ``new``, which replaces a ``kind``."""
        trainable = any(parameter.requires_grad for parameter in new.parameters(recurse=False))
        return cls(name, kind, new.num_channels, new.num_groups, new.eps, init, trainable)


@dataclass
class ConversionReport:
    """The fate of each norm; ``str`` gives a table.

    Attributes:
        layers: in the order of the model.
        parameters_before, parameters_after: number of values in the model's parameters.
        similarity: by stage, mean cosine between the original's outputs and the converted model's.
        steps: number of distillation steps.
    """

    layers: list[LayerReport] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    similarity: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    steps: int = 0

    def warn_of_layers(self) -> None:
        """Add the warnings that follow from the layers."""
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
                "compared with its eps), so they start as constants: weight 0 and the original's bias"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON values."""
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
        for stage, colour in _COLOURS.items():
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
        stages = [stage for stage in _COLOURS if any(stage in layer.errors for layer in self.layers)]
        rows = [["layer", "was", "C", "groups", "eps", "init", "trains", *(f"error {s}" for s in stages)]]
        for layer in self.layers:
            rows.append([printable(layer.name or "(the model)"), printable(layer.kind), str(layer.channels)])
            rows[-1] += [str(layer.groups), f"{layer.eps:g}", layer.init, "yes" if layer.trainable else "no"]
            rows[-1] += [f"{layer.errors[s]:.3f}" if s in layer.errors else "" for s in stages]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        sizes = f"{self.parameters_before} parameters before, {self.parameters_after} after"
        lines.append(f"{len(self.layers)} norms; {sizes}")
        lines += [f"outputs' cosine with the original, {s}: {c:.4f}" for s, c in self.similarity.items()]
        lines += [f"warning: {printable(warning)}" for warning in self.warnings]
        return "\n".join(lines)


def count_parameters(model: nn.Module) -> int:
    """Return the number of values in the parameters, without those of uninitialised lazy ones."""
    return sum(0 if nn.parameter.is_lazy(p) else p.numel() for p in model.parameters())
