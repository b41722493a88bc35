"""Loaders: an endless one for training, a finite one for evaluation. Both yield lists of Samples.

A batch depends on the config, the seed and its number, not on the number of workers: the position of an
image in the stream of images seeds its augmentation.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import secrets
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..distributed.group import from_main
from ..errors import UserError
from ..structures import PolygonMask, Sample
from .augmentation import (
    Augmentation,
    ResizeShortestEdge,
    build_augmentations,
    copy_paste,
    cuts_objects,
    prepare_test_image,
)
from .coco.dataset import CocoDataset, join_datasets
from .datasets import resolve_dataset
from .images import read_image
from .samplers import (
    Item,
    grouped_batches,
    in_batches,
    inference_range,
    repeat_factors,
    repeated_indices,
    share_of_rank,
    shuffled_indices,
)
from .tiles import TiledDataset
from .transforms import LabelledImage, to_target, to_tensor

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 2.0  # a worker closes its connections a moment before it counts as dead


def build_train_loader(
    cfg: Config, *, rank: int = 0, world_size: int = 1, start_iteration: int = 0, seed: int | None = None
) -> tuple[SampleLoader, CocoDataset]:
    """Return endless training batches of ``DATASETS.TRAIN``.

    Args:
        cfg: whole config.
        rank, world_size: this process among those that train together.
        start_iteration: number of batches that a resumed run has seen; they are skipped unread.
        seed: by default ``cfg.seed``; if that is negative, a random one, equal in all processes of an
            initialised process group. The loader keeps it as ``.seed``.

    Returns:
        An iterable of lists of ``IMS_PER_BATCH // world_size`` Samples with targets, and the dataset.

    Raises:
        UserError: files are missing or wrong, nothing is annotated, or the batch cannot be divided.
    """
    batch_size, rest = divmod(cfg.solver.ims_per_batch, world_size)
    if rest or batch_size == 0:
        raise UserError(
            "indivisible-batch",
            f"SOLVER.IMS_PER_BATCH {cfg.solver.ims_per_batch} is not divisible by the {world_size} processes"
            f"; set it to a multiple of {world_size}",
        )
    if not cfg.datasets.train:
        raise UserError("no-dataset", "DATASETS.TRAIN is empty; name the dataset to train on")
    masks = cfg.model.mask_on
    parts = [CocoDataset(resolve_dataset(cfg, n), masks=masks) for n in cfg.datasets.train]
    for part in parts:
        part.check_files()
    dataset = join_datasets(parts)
    images = training_images(cfg, dataset)
    if cfg.dataloader.tiles.size and cfg.datasets.test and not cfg.test.tiles.size:
        logger.warning("training on tiles, and evaluating on whole images: set TEST.TILES.SIZE, too")
    kept = trainable_images(images, cfg.dataloader.filter_empty_annotations)
    if seed is None:
        seed = cfg.seed if cfg.seed >= 0 else from_main(secrets.randbits(31))
    samples = TrainSamples(
        dataset=images,
        augmentations=build_augmentations(cfg),
        seed=seed,
        channel_order=cfg.input.format,
        draw_polygons=cfg.input.mask_format == "bitmask",
        boxes_from_masks=masks and cuts_objects(cfg),
        copy_paste=cfg.input.copy_paste,
    )
    make_stream = _sampler(cfg, images, kept)

    def batches() -> Iterator[list[Item]]:
        share = share_of_rank(make_stream(seed), rank, world_size)
        stream = ((kept[i], position) for i, position in share)
        if cfg.dataloader.aspect_ratio_grouping:
            sizes = images.images
            grouped = grouped_batches(stream, batch_size, lambda i: sizes[i].width > sizes[i].height)
        else:
            grouped = in_batches(stream, batch_size)
        return islice(grouped, start_iteration, None)

    return SampleLoader(samples, batches, None, cfg.dataloader.num_workers, seed), dataset


def build_test_loader(
    cfg: Config, name: str, *, rank: int = 0, world_size: int = 1
) -> tuple[SampleLoader, CocoDataset]:
    """Return all images of one dataset, in the order of their ids, without targets.

    Args:
        cfg: whole config.
        name: name of the dataset.
        rank, world_size: this process among all; each gets a contiguous part.

    Returns:
        An iterable with a length, of lists of at most ``TEST.IMS_PER_BATCH`` Samples, and the dataset.

    Raises:
        UserError: files are missing or wrong.
    """
    dataset = CocoDataset(resolve_dataset(cfg, name), masks=cfg.model.mask_on, evaluation=True)
    dataset.check_files()
    part = inference_range(len(dataset), rank, world_size)
    batches = list(in_batches(((i, i) for i in part), cfg.test.ims_per_batch))
    loader = SampleLoader(
        TestSamples(dataset, cfg), lambda: iter(batches), len(batches), cfg.dataloader.num_workers, 0
    )
    return loader, dataset


def build_loss_loader(
    cfg: Config, dataset: CocoDataset, *, rank: int = 0, world_size: int = 1
) -> SampleLoader:
    """Return images of a test set with targets, each by itself, resized as for inference.

    They are ``TEST.LOSS_IMAGES``, evenly spread among those that training would keep.

    Args:
        cfg: whole config.
        dataset: of :func:`build_test_loader`.
        rank, world_size: this process among all; each gets every ``world_size``-th image.
    """
    images = training_images(cfg, dataset)
    kept = np.arange(len(images))
    if cfg.dataloader.filter_empty_annotations:
        kept = np.flatnonzero(images.counts())
    places = np.linspace(0, len(kept) - 1, min(cfg.test.loss_images, len(kept))).round().astype(int)
    items = [[(int(index), 0)] for index in kept[places]][rank::world_size]
    resize = ResizeShortestEdge((cfg.input.min_size_test,), cfg.input.max_size_test)
    samples = TrainSamples(
        dataset=images,
        augmentations=[resize],
        seed=0,
        channel_order=cfg.input.format,
        draw_polygons=cfg.input.mask_format == "bitmask",
        boxes_from_masks=cfg.model.mask_on and cfg.dataloader.tiles.size > 0,
    )
    return SampleLoader(samples, lambda: iter(items), len(items), cfg.dataloader.num_workers, 0)


def training_images(cfg: Config, dataset: CocoDataset) -> CocoDataset | TiledDataset:
    """Return the images to choose from in training: the dataset's, or with ``DATALOADER.TILES`` its tiles."""
    tiles = cfg.dataloader.tiles
    return TiledDataset(dataset, tiles) if tiles.size else dataset


def trainable_images(dataset: CocoDataset | TiledDataset, filter_empty: bool) -> list[int]:
    """Return the indices of the images to train on: all, or those with objects if ``filter_empty``.

    Raises:
        UserError: there is no object at all.
    """
    counts = dataset.counts()
    if not counts.any():
        raise UserError(
            "no-objects",
            f"dataset {dataset.name} has no object to train on ({len(dataset)} images, {dataset.num_crowds} "
            f"crowd annotations) in {dataset.annotations_path}; add annotations",
        )
    kept = np.flatnonzero(counts) if filter_empty else np.arange(len(dataset))
    empty = len(dataset) - len(kept)
    left_out = f", without the {empty} that have no object" if empty else ""
    logger.info("%r: training on %d images%s", dataset, len(kept), left_out)
    return kept.tolist()


def _sampler(
    cfg: Config, dataset: CocoDataset | TiledDataset, kept: Sequence[int]
) -> Callable[[int], Iterator[int]]:
    """Return a function that makes an endless stream of positions in ``kept`` from a seed."""
    loader = cfg.dataloader
    if loader.sampler_train == "TrainingSampler":
        return partial(shuffled_indices, len(kept))
    labels = (dataset.labels(i).tolist() for i in kept)  # RepeatFactorTrainingSampler, the other known one
    return partial(repeated_indices, repeat_factors(labels, loader.repeat_threshold, loader.repeat_sqrt))


@dataclass(eq=False, kw_only=True)
class TrainSamples(Dataset[Sample]):
    """Augmented samples for (index, position); the position seeds the augmentation.

    ``copy_paste`` is the part of the samples that get objects of another image, augmented likewise.
    """

    dataset: CocoDataset | TiledDataset
    augmentations: Sequence[Augmentation]
    seed: int
    channel_order: str
    draw_polygons: bool
    boxes_from_masks: bool
    copy_paste: float = 0.0

    def __post_init__(self) -> None:
        self.with_objects = np.flatnonzero(self.dataset.counts())

    def __getitem__(self, item: Item) -> Sample:
        index, position = item
        record = self.dataset.images[index]
        random = np.random.default_rng([self.seed, position])
        labelled = self._augmented(index, random)
        if self.copy_paste and random.random() < self.copy_paste:
            other = self._augmented(int(random.choice(self.with_objects)), random)
            labelled = copy_paste(labelled, other, random)
        target = to_target(labelled, draw_polygons=self.draw_polygons, boxes_from_masks=self.boxes_from_masks)
        image = to_tensor(labelled.image, self.channel_order)
        return Sample(image, record.id, record.file_name, (record.height, record.width), target)

    def _augmented(self, index: int, random: np.random.Generator) -> LabelledImage:
        labelled = self.dataset.read(index)
        for augment in self.augmentations:
            labelled = augment(labelled, random)
        return labelled


@dataclass(eq=False)
class TestSamples(Dataset[Sample]):
    """Samples without targets for (index, anything), resized for inference."""

    __test__ = False  # not a test case for pytest

    dataset: CocoDataset
    cfg: Config

    def __getitem__(self, item: Item) -> Sample:
        record = self.dataset.images[item[0]]
        size = record.height, record.width
        pixels = read_image(record.file_name, "RGB", size)
        image_id = self.dataset.spelt_images.get(record.id, record.id)
        return Sample(prepare_test_image(pixels, self.cfg), image_id, record.file_name, size)


@dataclass(eq=False)
class SampleLoader(Iterable[list[Sample]]):
    """Loads batches, in this process or in workers; every ``iter()`` starts again.

    Attributes:
        samples: (index, position) -> Sample.
        batches: makes an iterator of lists of items.
        length: number of batches; None for an endless loader.
        num_workers: number of worker processes; 0 loads in this process.
        seed: seed of the run.
    """

    samples: Dataset[Sample]
    batches: Callable[[], Iterator[list[Item]]]
    length: int | None
    num_workers: int
    seed: int

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a training loader has no length: it is endless")
        return self.length

    def __iter__(self) -> Iterator[list[Sample]]:
        if self.num_workers == 0:
            for items in self.batches():
                yield [self.samples[item] for item in items]
            return
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        loader: DataLoader[Any] = DataLoader(
            _PackedSamples(self.samples),
            batch_sampler=self.batches(),
            num_workers=self.num_workers,
            collate_fn=list,
            multiprocessing_context="fork" if can_fork else None,
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # the model's random numbers must not depend on the loader
        )
        for batch in _batches_of_workers(loader):
            for packed in batch:
                if isinstance(packed, UserError):
                    raise packed
            yield [_unpack(*packed) for packed in batch]


def _leave_signals_to_the_run(worker: int) -> None:
    """Ignore Ctrl-C and launchers' signals to the whole group: the last step still needs its data."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _batches_of_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of ``loader``; raise UserError if a worker died.

    PyTorch's signal handler raises at any point of the program, also while a checkpoint is written. Ours
    is active only while the next batch is awaited. A handler is needed: the message of a dying worker never
    ends, so waiting would not either.
    """
    by_signals = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    previous: Any = signal.getsignal(signal.SIGCHLD) if by_signals else None
    others = multiprocessing.active_children()
    batches = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    if by_signals:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)

    # A program that ends sends SIGTERM to its processes and waits for them, and these ignore it.
    def kill() -> None:
        for worker in workers:
            worker.kill()

    atexit.register(kill)

    def report_death(number: int, frame: Any) -> None:
        if callable(previous):
            previous(number, frame)
        _check_workers(workers)

    try:
        while True:
            if by_signals:
                previous = signal.signal(signal.SIGCHLD, report_death)
            try:
                _check_workers(workers)
                batch = next(batches)
            except StopIteration:
                return
            except UserError:
                raise
            except Exception as error:
                # The connection may break first. And without signals PyTorch itself notices the death.
                if "in DataLoader worker process" not in str(error):
                    gone = wait([worker.sentinel for worker in workers], _GRACE_SECONDS)
                    for worker in workers:
                        if worker.sentinel in gone:
                            worker.join()
                    _check_workers(workers)
                raise
            finally:
                if by_signals:
                    signal.signal(signal.SIGCHLD, previous)
            yield batch
    finally:
        atexit.unregister(kill)


def _check_workers(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if code := worker.exitcode:
            how = f"signal {-code}: {signal.strsignal(-code)}" if code < 0 else f"exit status {code}"
            raise UserError(
                "process-killed",
                f"a data-loader worker died (process {worker.pid}, {how}); if the machine ran out of memory, "
                f"lower DATALOADER.NUM_WORKERS ({len(workers)}); --resume continues from the last checkpoint",
            )


@dataclass(eq=False)
class _PackedSamples(Dataset[Any]):
    """Samples in the form for other processes; a UserError is sent as a value to keep its one line."""

    samples: Dataset[Sample]

    def __getitem__(self, item: Item) -> tuple[Sample, Tensor | None] | UserError:
        try:
            return _pack(self.samples[item])
        except UserError as error:
            return error


def _pack(sample: Sample) -> tuple[Sample, Tensor | None]:
    """Put all bitmaps into one tensor: each tensor takes a file descriptor."""
    target = sample.target
    if target is None or target.masks is None:
        return sample, None
    bitmaps = [mask for mask in target.masks if isinstance(mask, Tensor)]
    if not bitmaps:
        return sample, None
    polygons: list[PolygonMask | Tensor] = [[] if isinstance(mask, Tensor) else mask for mask in target.masks]
    return replace(sample, target=replace(target, masks=polygons)), torch.stack(bitmaps)


def _unpack(sample: Sample, bitmaps: Tensor | None) -> Sample:
    """Undo :func:`_pack`; kept polygons are never empty."""
    if bitmaps is None or sample.target is None or sample.target.masks is None:
        return sample
    waiting = iter(bitmaps)
    masks = [mask if len(mask) else next(waiting) for mask in sample.target.masks]
    return replace(sample, target=replace(sample.target, masks=masks))
