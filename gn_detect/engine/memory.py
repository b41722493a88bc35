"""The memory of a training step, measured by a dry step, and ``SOLVER.ACCUMULATE`` chosen by it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..data import CocoDataset
from ..data.augmentation import shortest_edge_size
from ..data.loader import training_images
from ..data.tiles import TiledDataset
from ..distributed.group import gather, world_size
from ..errors import UserError
from ..structures import Sample, Target
from .metrics import memory_in_use
from .optimizer import step_unless
from .step import TrainingState, forward_backward, memory_remedies

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

_PART = 0.9  # of the free memory; the rest is for fragments, loader workers and other programs
_SMALLER = (0.75, 0.5, 0.25)  # sizes to try if one image does not fit
_GB = 2**30


def with_measured_parts(cfg: Config, state: TrainingState, dataset: CocoDataset) -> Config:
    """Return a config with a number for ``SOLVER.ACCUMULATE`` auto: the least that fits into the memory.

    A dry step runs on random images of the largest shape that the config makes of the dataset. It changes
    neither weights, running statistics and the optimiser's state nor random numbers. All processes call this.

    Args:
        cfg: whole config.
        state: of the model on its device, before the first step.
        dataset: to train on.

    Raises:
        UserError: not even one image fits, or the model has SyncBN: a process without enough memory would
            leave the others waiting.
    """
    if cfg.solver.accumulate:
        return cfg
    if any(isinstance(module, nn.SyncBatchNorm) for module in state.model.modules()):
        raise UserError("conflicting-keys", "SOLVER.ACCUMULATE auto is not for SyncBN; set it to a number")
    device = state.broken.device
    if device.type == "cpu" and not sys.platform.startswith("linux"):
        logger.warning("the memory of a step is measured on Linux and GPUs alone: SOLVER.ACCUMULATE 1")
        return cfg.replace({"SOLVER.ACCUMULATE": 1})
    pictures = training_images(cfg, dataset)
    images = cfg.solver.ims_per_batch // world_size()
    tried = []
    for parts in (number for number in range(1, images + 1) if images % number == 0):
        trial = cfg.replace({"SOLVER.ACCUMULATE": parts})
        fits, result = _fits(trial, state, pictures)
        tried.append(result)
        if fits:
            logger.info("%s: SOLVER.ACCUMULATE %d", "; ".join(tried), parts)
            return trial
    remedies = f"{_fitting_size(cfg, state, pictures)}{memory_remedies(cfg, 1)}"
    raise UserError(
        "out-of-memory",
        f"not even one image fits into the memory: {tried[-1]}; {remedies}; or freeze parts (MODEL.FREEZE)",
    )


def _fits(cfg: Config, state: TrainingState, dataset: CocoDataset | TiledDataset) -> tuple[bool, str]:
    """Return whether a step fits into the memory of every process, and a sentence about it."""
    images = cfg.solver.ims_per_batch // world_size() // cfg.solver.accumulate
    height, width = largest_shape(cfg, dataset, images)
    limit = _PART * available(state.broken.device)
    part = partial(largest_batch, cfg, dataset, images, (height, width))
    peak = peak_of_step(cfg, state, part, limit)
    limit, peak = min(gather(limit)), max(gather(peak))
    taken = f"{peak / _GB:.2f} of" if peak <= limit else "more than"
    noun = "image" if images == 1 else "images"
    what = f"a step with {images} {noun} of {width} x {height} pixels at a time takes"
    return peak <= limit, f"{what} {taken} {limit / _GB:.2f} GB"


def _fitting_size(cfg: Config, state: TrainingState, dataset: CocoDataset | TiledDataset) -> str:
    """Return the remedy of the largest of some smaller sizes that fits; empty if none does."""
    given = cfg.input
    for factor in _SMALLER if not given.large_scale_jitter.enabled else ():
        lengths = [max(1, int(length * factor)) for length in given.min_size_train]
        sizes = {"INPUT.MIN_SIZE_TRAIN": lengths, "INPUT.MAX_SIZE_TRAIN": int(given.max_size_train * factor)}
        trial = cfg.replace({**sizes, "SOLVER.ACCUMULATE": cfg.solver.ims_per_batch // world_size()})
        if _fits(trial, state, dataset)[0]:
            named = " ".join(f"{key} {value}" for key, value in sizes.items())
            return f"set {named}, which fit; or "
    return ""


def largest_shape(cfg: Config, dataset: CocoDataset | TiledDataset, images: int) -> tuple[int, int]:
    """Return (height, width) in pixels of the largest batch of so many images, before it is padded."""
    given = cfg.input
    if given.large_scale_jitter.enabled:
        height, width = given.large_scale_jitter.size
        return height, width
    trained = (dataset.counts() > 0) | (not cfg.dataloader.filter_empty_annotations)
    files = np.unique(dataset.images.sizes()[trained], axis=0)
    turned = given.rotate_90 or bool(given.albumentations)
    if turned:
        files = np.concatenate([files, files[:, ::-1]])
    sizes, wide = [], []
    for height, width in files.tolist():
        for size in _crops(cfg, height, width):
            sizes.append(shortest_edge_size(*size, max(given.min_size_train), given.max_size_train))
            wide.append(width > height)
    found, is_wide = np.array(sizes), np.array(wide)
    if images == 1:
        largest = found
    elif cfg.dataloader.aspect_ratio_grouping and not turned:
        largest = np.stack([found[is_wide == group].max(axis=0) for group in set(wide)])
    else:
        largest = found.max(axis=0)[None]
    height, width = largest[largest.prod(axis=1).argmax()].tolist()
    return height, width


def _crops(cfg: Config, height: int, width: int) -> list[tuple[int, int]]:
    """Return the sizes to which an image may be cropped: itself, and those of the most different shape."""
    whole, crop = (height, width), cfg.input.crop
    if not crop.enabled:
        return [whole]
    if crop.type.startswith("relative"):
        least = max(round(height * crop.size[0]), 1), max(round(width * crop.size[1]), 1)
    else:
        ends = crop.size if crop.type == "absolute" else (crop.size[0],) * 2
        least = min(int(ends[0]), height), min(int(ends[1]), width)
    if crop.type == "absolute_range":
        most = min(int(crop.size[1]), height), min(int(crop.size[1]), width)
    else:
        most = whole if crop.type == "relative_range" else least
    return [whole, (least[0], most[1]), (most[0], least[1])]


def largest_batch(
    cfg: Config, dataset: CocoDataset | TiledDataset, images: int, shape: tuple[int, int]
) -> list[Sample]:
    """Return random images of (height, width) pixels with at least as many objects as any of the dataset.

    There are enough objects for all RoIs that may be foreground, which decide about the mask head.
    """
    random, (height, width), heads = np.random.default_rng(0), shape, cfg.model.roi_heads
    foreground = int(heads.batch_size_per_image * heads.positive_fraction)
    count = max(int(dataset.counts().max()), foreground)
    samples = []
    for _ in range(images):
        corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1) * (width - 1, height - 1)
        corners[:, 1] += 1
        boxes = corners.reshape(count, 4)
        labels = torch.from_numpy(random.integers(0, heads.num_classes, count))
        target = Target(torch.from_numpy(boxes).float(), labels)
        if cfg.model.mask_on and cfg.input.mask_format == "polygon":
            target.masks = [[box[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in boxes]
        elif cfg.model.mask_on:
            target.masks = list(torch.ones(count, height, width, dtype=torch.bool))
        pixels = torch.from_numpy(random.integers(0, 256, (3, height, width), dtype=np.uint8))
        samples.append(Sample(pixels, 0, "dry step", shape, target))
    return samples


def peak_of_step(
    cfg: Config, state: TrainingState, make_part: Callable[[], list[Sample]], limit: float
) -> float:
    """Return the largest memory in bytes while a part of a batch goes through a step; infinite above a limit.

    The weights stay. The part goes through the model twice: the second time with the optimiser's state and,
    where parts are accumulated, with the gradients of the part before it.

    Args:
        cfg: ``SOLVER.ACCUMULATE`` is a number.
        state: of the model.
        make_part: makes the images that go through the model at once, which count, too.
        limit: in bytes; on a CPU the process gets no more.
    """
    device, optimizer = state.broken.device, state.optimizer
    statistics = [value.clone() for value in state.statistics]
    is_fresh = not optimizer.state
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), _peak_from_here(device), _limited(device, limit):
            part = make_part()
            images, targets = [s.image for s in part], [s.target for s in part]
            for _ in range(2):
                forward_backward(cfg, state, part, state.model, images, targets)
                step_unless(optimizer, torch.ones_like(state.broken))  # it makes AdamW's state
                if cfg.solver.accumulate == 1:
                    optimizer.zero_grad(set_to_none=True)
            return memory_in_use(device) * 2**20
    except (UserError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        for each in filter(None, (error, error.__cause__)):
            traceback.clear_frames(each.__traceback__)  # they hold the tensors of the network
        return float("inf")
    finally:
        optimizer.zero_grad(set_to_none=True)
        if is_fresh:
            optimizer.state.clear()
        for value, before in zip(state.statistics, statistics, strict=True):
            value.copy_(before)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means too little memory; on a CPU PyTorch and oneDNN have no type for it."""
    if isinstance(error, UserError):
        return error.code == "out-of-memory"
    return isinstance(error, MemoryError) or "alloc" in str(error) or "could not create" in str(error)


@contextmanager
def _peak_from_here(device: torch.device) -> Iterator[None]:
    """Let :func:`memory_in_use` begin anew, and again at the end, for the training's own peak."""

    def reset() -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(AttributeError):  # glibc alone keeps freed memory, and has this function
                ctypes.CDLL(None).malloc_trim(0)
            with suppress(OSError):  # where it is forbidden, the peak is that of the process so far
                Path("/proc/self/clear_refs").write_text("5")

    reset()
    try:
        yield
    finally:
        reset()


@contextmanager
def _limited(device: torch.device, limit: float) -> Iterator[None]:
    """Let this process have ``limit`` bytes, so that PyTorch raises before the kernel ends a process.

    A GPU's allocator raises by itself.
    """
    if device.type == "cuda":
        yield
        return
    import resource

    resident, data = _memory_now()
    if limit <= resident:  # oneDNN does not recover from a lack of memory for its own code
        raise MemoryError
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [each for each in (soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([int(data + limit - resident), *bounds]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available(device: torch.device) -> int:
    """Return the bytes that this process can have on a device: what it holds, and its share of the rest."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    rooms = [int(fields["MemAvailable"].split()[0]) * 1024]
    rooms += [limit - used for limit, used in cgroup_limits()]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return _memory_now()[0] + max(min(rooms), 0) // here


def _memory_now() -> tuple[int, int]:
    """Return the bytes of this process on Linux: those in memory, and those that RLIMIT_DATA counts."""
    sizes = Path("/proc/self/statm").read_text().split()
    return int(sizes[1]) * mmap.PAGESIZE, int(sizes[5]) * mmap.PAGESIZE


def cgroup_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each control group around this process, of Linux's both versions.

    Cached files do not count as used: the kernel drops them.

    Args:
        root: of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        second = (number, kinds) == ("0", "")
        if not second and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if second else "memory")
        names = ("memory.max", "memory.current", "inactive_file") if second else (
            "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        )  # fmt: skip
        own = top / path.strip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # "max": there is no limit
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                rows = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield limit, used - int(rows.get(names[2], 0))
            if folder == top:
                break
