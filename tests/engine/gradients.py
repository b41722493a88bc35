"""Compare gradients of two processes, or of two parts, with those of one process with the whole batch.

``python -m tests.engine.gradients`` prints the differences, max |a - b| / max |b| over all parameters.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gn_detect.config import Config, load_config
from gn_detect.data import build_train_loader
from gn_detect.distributed import launch
from gn_detect.distributed.group import get_rank, parallelize, world_size
from gn_detect.engine.graphs import StepGraphs
from gn_detect.engine.step import make_state, split, train_step
from gn_detect.modeling import build_model
from gn_detect.structures import Sample
from tests.engine.tiny import make_dataset, write_config

SAMPLE_ALL = [
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "5000", "MODEL.RPN.POSITIVE_FRACTION", "1.0",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "500", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0",
]  # fmt: skip
"""All anchors and RoIs are taken, none by chance."""


def make_config(folder: Path, norm: str) -> Config:
    """Batches of two different images of equal size; backbone and FPN have ``norm``."""
    data = make_dataset(folder / "data", 2, seed=3)
    content = json.loads(data.read_text())
    content["annotations"].pop()  # so that the images have one object and two
    data.write_text(json.dumps(content))
    keys = ["MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", norm, "INPUT.RANDOM_FLIP", "none", *SAMPLE_ALL]
    return load_config(write_config(folder, data), keys)


def of_backbone(cfg: Config, parts: int) -> dict[str, Tensor]:
    """Return gradients of a loss summed over all images, in float64, with the batch in ``parts``."""
    torch.manual_seed(0)
    backbone: nn.Module = build_model(cfg).backbone.double()
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    weights = torch.randn(64, dtype=torch.float64)
    wrapped = parallelize(backbone)
    own = images.chunk(world_size())[get_rank()]
    for part in own.chunk(parts):
        features = wrapped(part)
        loss = sum((f.sin() * weights[: f.shape[1], None, None]).sum() for f in features.values())
        (loss * world_size()).backward()  # several processes give the mean of their gradients
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def of_detector(cfg: Config, parts: int, graphs: bool = False) -> dict[str, Tensor]:
    """Return gradients of the whole detector's losses, by the training step itself."""
    torch.manual_seed(0)
    cfg = cfg.replace({"SOLVER.ACCUMULATE": parts})
    model = build_model(cfg).train()
    batch = _whole_batch(cfg)
    own = split(batch, world_size())[get_rank()]
    state = make_state(cfg, model)
    state.graphs = StepGraphs() if graphs else None
    train_step(cfg, parallelize(model), own, state)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def of_detector_by_graphs(cfg: Config, parts: int) -> dict[str, Tensor]:
    """Return the same of the step with graphs, whose first pass is eager."""
    return of_detector(cfg, parts, graphs=True)


def _whole_batch(cfg: Config) -> list[Sample]:
    loader, _ = build_train_loader(cfg)
    return next(iter(loader))


def _save(measure: Callable[[Config, int], dict[str, Tensor]], cfg: Config, path: str) -> None:
    """Runs in each of two processes."""
    torch.set_num_threads(1)
    gradients = measure(cfg, 1)
    if get_rank() == 0:
        torch.save(gradients, path)


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Max |a - b| / max |b| over all parameters together."""
    largest = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / largest


def compare(measure: Callable[[Config, int], dict[str, Tensor]], norm: str, folder: Path) -> dict[str, float]:
    """Differences of ``two processes`` and ``two parts`` from one process and one part."""
    cfg = make_config(folder, norm)
    whole = measure(cfg, 1)
    launch(_save, (measure, cfg, str(folder / "gradients.pth")), device="cpu", num_gpus=2)
    processes = torch.load(folder / "gradients.pth", weights_only=True)
    return {
        "two processes": relative_difference(processes, whole),
        "two parts": relative_difference(measure(cfg, 2), whole),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for title, measure in (("backbone + FPN, float64", of_backbone), ("detector, float32", of_detector)):
        for norm in ("GN", "BN"):
            with tempfile.TemporaryDirectory() as name:
                for case, value in compare(measure, norm, Path(name)).items():
                    print(f"{title}, {norm}, {case}: {value:.1e}")
