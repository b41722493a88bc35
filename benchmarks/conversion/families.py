"""``python -m benchmarks.conversion.families``: every torchvision model through the converters, side by side.

With random weights. Ours: are all norms converted, is the parameters' arithmetic right, does a forward and
a backward pass of one input in training mode work, does ``torch.compile`` with ``aot_eager`` give the same
(of detectors the backbone is compiled, as their post-processing depends on data). Opacus'
``ModuleValidator.fix``: how many norms are left, and how many lose their weights and biases. timm's
``convert_sync_batchnorm``, the only conversion of norms that it has: how many batch norms stay batch norms.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from gn_detect.convert import convert_norm

FAMILIES = {
    "classification": torchvision.models,
    "detection": torchvision.models.detection,
    "segmentation": torchvision.models.segmentation,
    "video": torchvision.models.video,
}
INDUCTOR = ("resnet18", "fasterrcnn_mobilenet_v3_large_320_fpn", "lraspp_mobilenet_v3_large", "r3d_18")
"""One model of each family, compiled with the default backend too."""

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, torchvision.ops.FrozenBatchNorm2d)


def main() -> None:
    """Print a line for each model, and save all after each; a run with the same file continues there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion.families", description=__doc__)
    parser.add_argument("--only", default="", help="part of the names")
    parser.add_argument("--largest", type=float, default=200, help="millions of parameters to compile")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: dict[str, dict[str, Any]] = {}
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())
    print(
        f"{'model':44}{'norms':>6}{'ours':>12}{'compiled':>18}{'opacus left':>13}{'lost':>6}{'timm left':>11}"
    )
    for family, module in FAMILIES.items():
        for name in torchvision.models.list_models(module=module):
            if args.only not in name:
                continue
            if rows.get(name, {}).get("norms", 1) and "timm_left" not in rows.get(name, {}):
                row = measure(family, name, 0 if args.no_compile else args.largest * 1e6)
                rows[name] = {"family": family, **row}
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
            if rows[name]["norms"]:
                print(_line(name, rows[name]), flush=True)
    with_norms = [row for row in rows.values() if row["norms"]]
    print(f"{len(rows)} models, {len(with_norms)} with BatchNorm or FrozenBatchNorm")


def _line(name: str, row: dict[str, Any]) -> str:
    compiled = ", ".join(row.get("compiled", [])) or "-"
    opacus = f"{row['opacus_left']:>13}{row['opacus_affine_lost']:>6}"
    return f"{name:44}{row['norms']:>6}{row['ours']:>12}{compiled:>18}{opacus}{row['timm_left']:>11}"


def measure(family: str, name: str, largest: float) -> dict[str, Any]:
    """One model; what fails is reported as text, so that the others are still measured."""
    torch.manual_seed(0)
    model = _make(family, name)
    norms = {key: module for key, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
    if not norms:
        return {"norms": 0}
    for norm in norms.values():
        if isinstance(norm.weight, Tensor):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    row: dict[str, Any] = {"norms": len(norms)}
    start = time.perf_counter()
    row |= _opacus(model, norms) | {"timm_left": _timm(model)}
    size = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(
        2 * norm.weight.numel() for norm in norms.values() if not isinstance(norm.weight, nn.Parameter)
    )
    try:
        new, report = convert_norm(model, inplace=True)
        left = sum(isinstance(module, BATCH_NORMS) for module in new.modules())
        if left or report.parameters_after != size + frozen:
            raise AssertionError(
                f"{left} norms left, {report.parameters_after} parameters of {size + frozen}"
            )
        _train_step(family, name, new)
        row["ours"] = "trains"
        if size <= largest:
            row["compiled"] = []
            for backend in ("aot_eager", "inductor") if name in INDUCTOR else ("aot_eager",):
                _compile(family, name, new, backend)
                row["compiled"].append(backend)
    except Exception as error:
        row["ours"] = row.get("ours", "fails")
        row["error"] = repr(error)[:300]
    row["seconds"] = round(time.perf_counter() - start, 1)
    del model
    gc.collect()
    return row


def _make(family: str, name: str) -> nn.Module:
    options: dict[str, Any] = {"weights": None}
    if family in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # theirs takes a minute
    model: nn.Module = torchvision.models.get_model(name, **options)
    if family == "detection":
        transform: Any = model.transform
        if transform.fixed_size is None:
            transform.min_size, transform.max_size = (128,), 160
    return model


def _inputs(family: str, name: str) -> tuple[Any, ...]:
    if family == "video":
        side = 224 if name == "s3d" else 112
        return (torch.rand(1, 3, 16, side, side),)
    if family == "detection":
        target = {"boxes": torch.tensor([[8.0, 8.0, 90.0, 90.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, 128, 128, dtype=torch.uint8)
        target["keypoints"] = torch.tensor([[[40.0, 40.0, 1.0]] * 17])
        return [torch.rand(3, 128, 128)], [target]
    side = {"inception_v3": 299, "maxvit_t": 224}.get(name, 128)
    return (torch.rand(1, 3, side, side),)


def _train_step(family: str, name: str, model: nn.Module) -> None:
    model.train()
    total = _total(model(*_inputs(family, name)))
    total.backward()
    if not total.isfinite():
        raise AssertionError(f"the output's sum is {total.item()}")
    model.zero_grad(set_to_none=True)


def _total(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.float().sum()
    items = value.values() if isinstance(value, dict) else [item for item in value if item is not None]
    return torch.stack([_total(item) for item in items]).sum()


def _compile(family: str, name: str, model: nn.Module, backend: str) -> None:
    module = model.get_submodule("backbone") if family == "detection" else model
    module.eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend)
    inputs = (torch.rand(1, 3, 128, 128),) if family == "detection" else _inputs(family, name)
    found, expected = _total(compiled(*inputs)), _total(module(*inputs))
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def _opacus(model: nn.Module, norms: dict[str, nn.Module]) -> dict[str, Any]:
    from opacus.validators import ModuleValidator

    try:
        fixed = dict(ModuleValidator.fix(copy.deepcopy(model)).named_modules())
    except Exception as error:
        return {"opacus_left": "fails", "opacus_affine_lost": "-", "opacus_error": repr(error)[:300]}
    left = sum(isinstance(fixed.get(name), BATCH_NORMS) for name in norms)
    lost = sum(
        not isinstance(fixed[name], BATCH_NORMS) and not torch.equal(fixed[name].weight, norm.weight)
        for name, norm in norms.items()
    )
    return {"opacus_left": left, "opacus_affine_lost": lost}


def _timm(model: nn.Module) -> int:
    from timm.layers import convert_sync_batchnorm

    converted = convert_sync_batchnorm(copy.deepcopy(model))
    return sum(isinstance(module, BATCH_NORMS) for module in converted.modules())


if __name__ == "__main__":
    main()
