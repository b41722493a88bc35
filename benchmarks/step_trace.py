"""``python -m benchmarks.step_trace``: what one training step asks of a GPU, counted without one.

It runs ``train_step`` on a pretended device (:mod:`benchmarks.pretended_device`) with seeded images and
ellipses, and prints the launched operators of each phase, the waits of the host and the copies to the
device by file and function. ``KEY VALUE`` pairs change the config, such as ``SOLVER.AMP.ENABLED True``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.pretended_device import DEVICE, Event, copies, launches, pretended_device, views, waits
from gn_detect.config import Config, load_config
from gn_detect.engine.step import make_state, train_step
from gn_detect.modeling import build_model
from gn_detect.ops import rasterize_polygons
from gn_detect.structures import Sample, Target

CONFIG = "GN/mask_rcnn_R_50_FPN_2x_gn.yaml"


def main() -> None:
    """Trace a step, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default=CONFIG, help="%(default)s")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1344), metavar=("H", "W"), help="in pixels"
    )
    parser.add_argument("--images", type=int, default=2, help="in the batch")
    parser.add_argument("--bitmaps", action="store_true", help="masks as bitmaps instead of polygons")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the config")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.overrides)
    objects = [7] * args.images
    batch = make_batch(objects, args.size, cfg.model.roi_heads.num_classes, args.bitmaps)
    print(describe(trace_step(cfg, batch)))


def make_batch(
    objects: Sequence[int], size: tuple[int, int], num_classes: int, bitmaps: bool = False, seed: int = 0
) -> list[Sample]:
    """Return an image of (height, width) with seeded noise for each number of objects, which are ellipses."""
    random = np.random.default_rng(seed)
    batch = []
    for number, count in enumerate(objects):
        image = torch.from_numpy(random.integers(0, 256, (3, *size), dtype=np.uint8))
        extent = random.uniform(0.15, 0.5, (count, 2)) * min(size)
        corner = random.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - extent)
        angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        circle = (1 + np.stack([np.cos(angle), np.sin(angle)], axis=1)) / 2
        polygons = [[(c + e * circle).reshape(-1)] for c, e in zip(corner, extent, strict=True)]
        masks = [torch.from_numpy(rasterize_polygons(p, *size)) for p in polygons] if bitmaps else polygons
        boxes = torch.from_numpy(np.concatenate([corner, corner + extent], axis=1)).float()
        labels = torch.from_numpy(random.integers(0, num_classes, count))
        batch.append(Sample(image, number, "", size, Target(boxes, labels, masks)))  # type: ignore[arg-type]
    return batch


def trace_step(cfg: Config, batch: Sequence[Sample]) -> list[Event]:
    """Return the events of a step; their values are not exact."""
    cfg = cfg.replace({"MODEL.DEVICE": DEVICE.type, "MODEL.WEIGHTS": ""})
    with pretended_device(exact=False) as trace:
        model = build_model(cfg).to(DEVICE).train()
        state = make_state(cfg, model)
        return trace.record(lambda: train_step(cfg, model, batch, state))


def describe(events: Sequence[Event]) -> str:
    """Return a table of the counts."""
    by_phase, waiting, copied = launches(events), waits(events), copies(events)
    lines = [f"{name:<12} {count:6}" for name, count in by_phase.items()]
    lines += [
        f"{'operators':<12} {by_phase.total():6}",
        f"{'views':<12} {views(events):6}  (and allocations)",
    ]
    lines += [f"{'waits':<12} {waiting.total():6}"]
    lines += [f"{count:19}  {file}:{function}" for (file, function), count in waiting.items()]
    lines += [f"{'copies':<12} {copied.total():6}"]
    lines += [f"{count:19}  {file}:{function}, {kind}" for (file, function, kind), count in copied.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
