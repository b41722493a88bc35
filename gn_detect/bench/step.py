"""Time and memory of a training step or a detection, part by part.

The workload is the same everywhere: images, objects and proposals from a seed. So the number of foreground
RoIs, and with it the work of the heads, does not depend on the weights. Another toolkit can read the
workload's folder.
"""

from __future__ import annotations

import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..data import build_test_loader, build_train_loader
from ..distributed.group import resolve_device
from ..engine.metrics import memory_in_use
from ..engine.step import make_state, train_step
from ..files import atomic_write_json
from ..modeling import build_model, detection_format
from ..modeling.mask_rcnn import MaskRCNN
from .cases import Workload

if TYPE_CHECKING:
    from ..config import Config

MIB = 2**20
PARTS = ("backbone", "fpn", "rpn", "roi_heads", "losses", "backward", "optimizer", "paste_masks")


@dataclass
class Report:
    """Result of a benchmark.

    Attributes:
        seconds: time of each step without the batch, which other processes prepare in a run.
        parts: part -> milliseconds in one step, from a few extra steps under torch's profiler.
        memory: bytes by which the process (on a GPU the allocator) grew since before the first step.
        summary: total loss, or number of detections; equal runs have equal ones.
    """

    seconds: list[float]
    parts: dict[str, float] = field(default_factory=dict)
    memory: int = 0
    summary: float = 0.0

    def __str__(self) -> str:
        parts = {name: ms for name, ms in self.parts.items() if name != "data"}
        total = sum(parts.values())
        rows = [f"{name:<10} {ms:9.1f} ms {ms / total:6.1%}" for name, ms in parts.items()]
        if "data" in self.parts:
            rows.append(f"{'data':<10} {self.parts['data']:9.1f} ms in addition")
        median, least = statistics.median(self.seconds), min(self.seconds)
        rows.append(
            f"one step, without data: median {median:.3f} s, least {least:.3f} s of {len(self.seconds)}"
        )
        return "\n".join([*rows, f"peak memory above the start: {self.memory / MIB:.0f} MiB"])


def benchmark(
    cfg: Config, mode: str, workload: Workload, iterations: int = 10, folder: Path | None = None
) -> Report:
    """Time ``mode``, ``"train"`` or ``"infer"``, of a config's model with fresh weights.

    Args:
        cfg: decides model, device and solver; datasets and image sizes are the workload's.
        mode: kind of step.
        workload: data of a step.
        iterations: timed steps, after one that is not timed.
        folder: folder for images, ``annotations.json`` and ``proposals.json``; by default a temporary one.
    """
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        proposals = write_workload(Path(place), workload)
        cfg = _with_workload(cfg, Path(place), workload)
        device = resolve_device(cfg.model.device)
        torch.manual_seed(0)
        model = build_model(cfg).to(device)
        _inject(model, proposals)
        step = _training_step(cfg, model) if mode == "train" else _inference_step(cfg, model)
        return _measure(step, device, iterations)


def write_workload(folder: Path, workload: Workload) -> list[Tensor]:
    """Write images, annotations and proposals to ``folder``; return the proposals, (P, 4) for each image."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    size = np.array([workload.width, workload.height], dtype=np.float64)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    proposals = []
    for number in range(1, workload.images + 1):
        pixels = random.integers(0, 256, (workload.height, workload.width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": workload.height, "width": workload.width}
        )
        extent = random.uniform(40, 220, (workload.objects, 2))
        corner = random.uniform(0, 1, (workload.objects, 2)) * (size - extent)
        for start, length in zip(corner, extent, strict=True):
            angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)[:, None]
            outline = start + length / 2 * (1 + np.concatenate([np.cos(angle), np.sin(angle)], axis=1))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(random.integers(1, 81)),
                    "bbox": [*start.tolist(), *length.tolist()],
                    "segmentation": [outline.reshape(-1).tolist()],
                    "area": float(np.pi / 4 * length.prod()),
                    "iscrowd": 0,
                }
            )
        proposals.append(
            _proposals(random, np.concatenate([corner, corner + extent], axis=1), size, workload)
        )
    categories = [{"id": i, "name": f"category {i}"} for i in range(1, 81)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    atomic_write_json(folder / "annotations.json", coco)
    atomic_write_json(folder / "proposals.json", [p.tolist() for p in proposals])
    return [torch.from_numpy(p).float() for p in proposals]


def _proposals(
    random: np.random.Generator, objects: np.ndarray, size: np.ndarray, workload: Workload
) -> np.ndarray:
    """Return (P, 4) ``xyxy``: objects moved by at most an eighth of their size, and boxes anywhere."""
    near = workload.proposals // 2
    base = objects[random.integers(0, len(objects), near)]
    extent = np.tile(base[:, 2:] - base[:, :2], 2)
    moved = base + extent * random.uniform(-0.125, 0.125, (near, 4))
    extent = random.uniform(0, 1, (workload.proposals - near, 2)) ** 2 * 300 + 16
    corner = random.uniform(0, 1, extent.shape) * (size - 16)
    boxes = np.concatenate([moved, np.concatenate([corner, corner + extent], axis=1)])
    return np.clip(boxes, 0, np.tile(size, 2))


def _with_workload(cfg: Config, folder: Path, workload: Workload) -> Config:
    entry = {"annotations": str(folder / "annotations.json"), "images": str(folder)}
    short, long = sorted((workload.height, workload.width))
    return cfg.replace(
        {
            "DATASETS.REGISTER": {"benchmark": entry},
            "DATASETS.TRAIN": ["benchmark"],
            "DATASETS.TEST": ["benchmark"],
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.MIN_SIZE_TRAIN": [short],
            "INPUT.MAX_SIZE_TRAIN": long,
            "INPUT.MIN_SIZE_TEST": short,
            "INPUT.MAX_SIZE_TEST": long,
            "INPUT.RANDOM_FLIP": "none",
            "SOLVER.IMS_PER_BATCH": workload.images,
            "SOLVER.ACCUMULATE": cfg.solver.accumulate or 1,
            "TEST.IMS_PER_BATCH": workload.images,
            "MODEL.ROI_HEADS.NUM_CLASSES": 80,
            # Fresh weights score all classes alike; about half of them pass.
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0125,
            "MODEL.WEIGHTS": "",
            "SEED": 0,
        }
    )


def _inject(model: MaskRCNN, proposals: list[Tensor]) -> None:
    """Let the RPN do all its work, then replace its proposals by the workload's."""
    rpn = model.proposal_generator
    own, own_padded = rpn.select_proposals, rpn.select_padded_proposals
    given = [p.to(model.device) for p in proposals]
    padded = torch.stack(given), torch.ones(len(given), len(given[0]), dtype=torch.bool, device=model.device)

    def select_proposals(*args: Any) -> list[Tensor]:
        own(*args)
        return given

    def select_padded_proposals(*args: Any) -> tuple[Tensor, Tensor]:
        own_padded(*args)
        return padded

    rpn.select_proposals = select_proposals  # type: ignore[method-assign,assignment]
    rpn.select_padded_proposals = select_padded_proposals  # type: ignore[method-assign,assignment]


Step = Callable[[], tuple[float, Tensor]]  # does one step; returns the seconds for data, and the summary


def _training_step(cfg: Config, model: MaskRCNN) -> Step:
    loader, _ = build_train_loader(cfg)
    batches = iter(loader)
    state = make_state(cfg, model)
    model.train()

    def step() -> tuple[float, Tensor]:
        begin = time.perf_counter()
        batch = next(batches)
        data = time.perf_counter() - begin
        losses, _ = train_step(cfg, model, batch, state)
        return data, torch.stack(list(losses.values())).sum().detach()

    return step


def _inference_step(cfg: Config, model: MaskRCNN) -> Step:
    loader, _ = build_test_loader(cfg, "benchmark")
    model.eval().use_memory_format(detection_format(cfg))

    def step() -> tuple[float, Tensor]:
        begin = time.perf_counter()
        batch = next(iter(loader))
        data = time.perf_counter() - begin
        with torch.inference_mode():
            found = model.detect([s.image for s in batch], [s.original_size for s in batch])
        return data, torch.tensor(sum(len(detections) for detections in found))

    return step


def _measure(step: Step, device: torch.device, iterations: int) -> Report:
    before = _memory(device)
    summary = float(step()[1])
    seconds, data = [], []
    for _ in range(iterations):
        begin = time.perf_counter()
        waited, _ = step()
        _synchronize(device)
        seconds.append(time.perf_counter() - begin - waited)
        data.append(waited)
    memory = round(memory_in_use(device) * MIB) - before
    return Report(seconds, _profile(step, device, statistics.median(data)), memory, summary)


def _profile(step: Step, device: torch.device, data: float, steps: int = 3) -> dict[str, float]:
    """Return milliseconds of each part in one step; ``record_function`` marks the parts in the model."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        _synchronize(device)
    time_of = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.key in {*PARTS, "rpn_losses", "roi_losses"}:
            spent[event.key] = max(spent.get(event.key, 0.0), getattr(event, time_of) / steps / 1e3)
    for stage in ("rpn", "roi"):
        losses = spent.pop(f"{stage}_losses", 0.0)
        spent["losses"] = spent.get("losses", 0.0) + losses
        spent["rpn" if stage == "rpn" else "roi_heads"] -= losses
    return {"data": data * 1e3} | {name: spent[name] for name in PARTS if spent.get(name)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    statistics_file = Path("/proc/self/statm")
    if statistics_file.exists():
        return int(statistics_file.read_text().split()[1]) * mmap.PAGESIZE
    return round(memory_in_use(device) * MIB)


def describe_machine(device: torch.device) -> str:
    """Return PyTorch's version, the processor or GPU and the threads in one line."""
    if device.type == "cuda":
        return f"PyTorch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    return f"PyTorch {torch.__version__}, CPU, {torch.get_num_threads()} threads"
