"""Bytes that GPUs exchange in a training step and the efficiency to expect; and the overlap of two processes.

``python -m benchmarks.scaling`` writes ``benchmarks/scaling.md``. The table is arithmetic; how much of the
exchange the backward pass hides is measured on two gloo processes of this machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from gn_detect.config import Config, load_config
from gn_detect.distributed import launch
from gn_detect.distributed.group import barrier, get_rank, parallelize
from gn_detect.modeling import build_model

CONFIG = "GN/mask_rcnn_R_50_FPN_3x_gn.yaml"
BUCKET = 25 * 2**20  # bytes; DistributedDataParallel's default
STEP_SECONDS = 0.309  # detectron2's model zoo: this model, 2 images of 800 pixels per V100, 8 GPUs
BACKWARD_SHARE = 0.6  # of a step; it hides the exchange


@dataclass(frozen=True)
class Link:
    """What a ring runs over.

    Attributes:
        name: for the table.
        bandwidth: bytes per second that one ring carries at its slowest place.
        latency: seconds for each hop of each bucket.
    """

    name: str
    bandwidth: float
    latency: float


NVLINK = Link("NVLink, 120 GB/s", 120e9, 5e-6)
PCIE = Link("PCIe 3 x16, 10 GB/s", 10e9, 8e-6)
INFINIBAND = Link("100 Gb/s InfiniBand per node, 11 GB/s", 11e9, 15e-6)
ETHERNET = Link("25 Gb/s Ethernet per node, 2.8 GB/s", 2.8e9, 30e-6)


def gradient_bytes(cfg: Config) -> int:
    """Of all trained parameters, in float32, as they are exchanged."""
    return sum(p.numel() * p.element_size() for p in build_model(cfg).parameters() if p.requires_grad)


def ring_bytes(gradients: int, gpus: int) -> float:
    """What each GPU sends in a ring all-reduce: 2 (N - 1) / N of the gradients."""
    return 2 * (gpus - 1) / gpus * gradients


def exchange_seconds(gradients: int, gpus: int, link: Link) -> float:
    """Of one step's ring all-reduce, bucket by bucket."""
    buckets = -(-gradients // BUCKET)
    return ring_bytes(gradients, gpus) / link.bandwidth + buckets * 2 * (gpus - 1) * link.latency


def efficiency(gradients: int, gpus: int, link: Link) -> float:
    """Of N GPUs: the step alone over the step with what of the exchange is not hidden.

    The last bucket is ready when the backward pass ends, so it is never hidden.
    """
    if gpus == 1:
        return 1.0
    exchange = exchange_seconds(gradients, gpus, link)
    last = exchange * min(1.0, BUCKET / gradients)
    exposed = max(exchange - BACKWARD_SHARE * STEP_SECONDS, last)
    return STEP_SECONDS / (STEP_SECONDS + exposed)


def table(gradients: int) -> str:
    """As Markdown."""
    rows = [
        "| GPUs | link | sent by each GPU per step | exchange | efficiency |",
        "|---|---|---|---|---|",
    ]
    for gpus, links in ((1, [None]), (8, [NVLINK, PCIE]), (64, [INFINIBAND, ETHERNET])):
        for link in links:
            if link is None:
                rows.append("| 1 | | 0 MB | 0 ms | 100% |")
                continue
            rows.append(
                f"| {gpus} | {link.name} | {ring_bytes(gradients, gpus) / 1e6:.0f} MB "
                f"| {exchange_seconds(gradients, gpus, link) * 1e3:.1f} ms "
                f"| {efficiency(gradients, gpus, link):.1%} |"
            )
    return "\n".join(rows)


def measure(cfg: Config, side: int, steps: int, path: str) -> None:
    """Runs in each of two processes: median seconds of forward and backward with and without the exchange.

    Backbone and FPN only, so that both processes have the same work.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = parallelize(build_model(cfg).backbone)
    images = torch.randn(1, 3, side, side)
    flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    seconds: dict[str, list[float]] = {"alone": [], "together": [], "exchange": []}
    for step in range(steps + 1):
        for kind, times in seconds.items():
            barrier()
            begin = time.perf_counter()
            if kind == "exchange":
                dist.all_reduce(flat)
            else:
                with model.no_sync() if kind == "alone" else nullcontext():  # type: ignore[operator]
                    torch.stack([f.mean() for f in model(images).values()]).sum().backward()
            barrier()
            if step:  # the first one warms up
                times.append(time.perf_counter() - begin)
    if get_rank() == 0:
        medians = {kind: statistics.median(times) for kind, times in seconds.items()}
        torch.save({**medians, "bytes": flat.numel() * 4}, path)


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256, help="pixels of the measured images")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    gradients = gradient_bytes(cfg)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/seconds.pth"
        launch(measure, (cfg, args.side, args.steps, path), device="cpu", num_gpus=2)
        s = torch.load(path, weights_only=True)
    exposed = max(s["together"] - s["alone"], 0.0)
    hidden = 1 - exposed / s["exchange"]
    args.output.write_text(
        f"""# Scaling

Made by `python -m benchmarks.scaling`. **No GPU was used: the table is arithmetic.**

`{CONFIG}` has {gradients / 4e6:.1f} million trained parameters: {gradients / 1e6:.0f} MB of float32 gradients
per step, in {-(-gradients // BUCKET)} buckets of 25 MiB. A ring all-reduce sends 2 (N - 1) / N of that from
each GPU. Assumptions:

| | |
|---|---|
| step of 2 images per GPU, as detectron2 publishes for this model on V100s | {STEP_SECONDS} s |
| share of the backward pass, which hides the exchange of all buckets but the last | {BACKWARD_SHARE:.0%} |
| other data: flags for a non-finite loss and a request to stop, pixel statistics | under 100 bytes per step |

A rank that waits for data, or has more objects than others, costs more than the exchange. The table leaves
that out.

{table(gradients)}

With 64 GPUs the ring goes through each node's network card once. `SOLVER.ACCUMULATE` k divides the exchange
per image by k if `SOLVER.IMS_PER_BATCH` grows with it.

## Measured on a CPU
Two gloo processes with a thread each, {platform.processor() or platform.machine()}, PyTorch
{torch.__version__}; backbone + FPN of the same model ({s["bytes"] / 1e6:.0f} MB of gradients), one image of
{args.side} x {args.side}, medians of {args.steps} steps:

| forward and backward without exchange | with it | the exchange alone | hidden |
|---|---|---|---|
| {s["alone"]:.3f} s | {s["together"]:.3f} s | {s["exchange"]:.3f} s | {hidden:.0%} |

CPU processes cannot hide the exchange as a GPU's copy engines do: gloo's threads take time from the backward
pass.
"""
    )
    print(args.output.read_text())


if __name__ == "__main__":
    main()
