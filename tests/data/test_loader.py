"""Loaders: batches that depend on the config and the seed alone, and refusals before any training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gn_detect.data import DatasetSource, build_test_loader, build_train_loader, resolve_dataset
from gn_detect.errors import UserError
from gn_detect.structures import Sample
from tests.refusal import refusal

MakeCfg = Callable[..., Any]
EVERYTHING = {
    "input__crop__enabled": True,
    "input__color_jitter__enabled": True,
    "input__min_size_train_sampling": "range",
    "input__rotate_90": True,
    "input__affine__enabled": True,
    "input__copy_paste": 0.5,
}


@pytest.fixture
def small(write_dataset: Callable, small_coco: dict) -> DatasetSource:
    """The small dataset on disk."""
    return write_dataset(small_coco)


def take(loader: Iterable[list[Sample]], count: int) -> list[list[Sample]]:
    return list(islice(loader, count))


def assert_same(first: list[list[Sample]], second: list[list[Sample]]) -> None:
    assert [[s.image_id for s in batch] for batch in first] == [
        [s.image_id for s in batch] for batch in second
    ]
    for a, b in zip(sum(first, []), sum(second, []), strict=True):
        assert (a.file_name, a.original_size) == (b.file_name, b.original_size)
        torch.testing.assert_close(a.image, b.image, rtol=0, atol=0)
        torch.testing.assert_close(a.target.boxes, b.target.boxes, rtol=0, atol=0)
        torch.testing.assert_close(a.target.labels, b.target.labels)
        for mask, other in zip(a.target.masks, b.target.masks, strict=True):
            assert type(mask) is type(other)
            if isinstance(mask, Tensor):
                torch.testing.assert_close(mask, other)
            else:
                np.testing.assert_array_equal(np.concatenate(mask), np.concatenate(other))


def test_train_samples(small: DatasetSource, make_cfg: MakeCfg) -> None:
    loader, dataset = build_train_loader(make_cfg(small))
    assert dataset.class_names == ["ant", "cat", "dog"]
    sizes = {2: (90, 60), 5: (64, 64), 7: (60, 90)}
    kinds = set()
    for batch in take(loader, 20):
        assert len(batch) == 2
        assert len({s.original_size[1] > s.original_size[0] for s in batch}) == 1
        for sample in batch:
            assert sample.image.dtype == torch.uint8
            assert sample.image.is_contiguous()
            assert min(sample.image.shape[1:]) in (48, 64)
            assert sample.image.shape[0] == 3
            assert sample.original_size == sizes[sample.image_id]
            assert Path(sample.file_name) == small.images / f"{sample.image_id}.png"
            for mask in sample.target.masks:
                kinds.add(type(mask))
                assert not isinstance(mask, Tensor) or mask.shape == sample.image.shape[1:]
    assert kinds == {list, Tensor}


def test_bitmask_format_draws_polygons(small: DatasetSource, make_cfg: MakeCfg) -> None:
    loader, _ = build_train_loader(make_cfg(small, input__mask_format="bitmask"))
    for sample in sum(take(loader, 8), []):
        for mask in sample.target.masks:
            assert mask.dtype == torch.bool
            assert mask.shape == sample.image.shape[1:]
            assert mask.any()


def test_model_without_masks(small: DatasetSource, make_cfg: MakeCfg) -> None:
    changes = EVERYTHING | {"model__mask_on": False, "input__copy_paste": 0.0}
    loader, _ = build_train_loader(make_cfg(small, **changes))
    assert all(sample.target.masks is None for sample in sum(take(loader, 5), []))


def test_channel_order(small: DatasetSource, make_cfg: MakeCfg) -> None:
    images = [
        next(iter(build_train_loader(make_cfg(small, input__format=order))[0]))[0].image
        for order in ("RGB", "BGR")
    ]
    torch.testing.assert_close(images[0], images[1].flip(0))


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_workers_do_not_change_batches(small: DatasetSource, make_cfg: MakeCfg, mask_format: str) -> None:
    expected, *others = (
        take(
            build_train_loader(
                make_cfg(small, dataloader__num_workers=n, input__mask_format=mask_format, **EVERYTHING)
            )[0],
            7,
        )
        for n in (0, 1, 2)
    )
    for batches in others:
        assert_same(expected, batches)


def test_seed_decides(small: DatasetSource, make_cfg: MakeCfg) -> None:
    torch.manual_seed(0)
    expected = take(build_train_loader(make_cfg(small, **EVERYTHING))[0], 6)
    state = torch.get_rng_state()
    np.random.seed(99)
    torch.manual_seed(99)
    loader, _ = build_train_loader(make_cfg(small, **EVERYTHING))
    assert_same(expected, take(loader, 6))
    assert_same(expected, take(loader, 6))  # each iteration begins anew
    other = take(build_train_loader(make_cfg(small, seed=2, **EVERYTHING))[0], 6)
    assert [s.image.shape for s in sum(other, [])] != [s.image.shape for s in sum(expected, [])]
    torch.manual_seed(0)
    take(build_train_loader(make_cfg(small, dataloader__num_workers=1))[0], 2)
    torch.testing.assert_close(torch.get_rng_state(), state)  # the model's random numbers are left alone


def test_negative_seed_is_random_and_told(small: DatasetSource, make_cfg: MakeCfg) -> None:
    loaders = [build_train_loader(make_cfg(small, seed=-1))[0] for _ in range(2)]
    assert loaders[0].seed != loaders[1].seed
    again, _ = build_train_loader(make_cfg(small, seed=-1), seed=loaders[0].seed)
    assert_same(take(loaders[0], 4), take(again, 4))


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_resumed_run_continues_exactly(small: DatasetSource, make_cfg: MakeCfg, sampler: str) -> None:
    changes = EVERYTHING | {"dataloader__sampler_train": sampler, "dataloader__repeat_threshold": 0.9}
    whole = take(build_train_loader(make_cfg(small, **changes))[0], 12)
    rest = take(build_train_loader(make_cfg(small, **changes), start_iteration=5)[0], 7)
    assert_same(whole[5:], rest)


def test_ranks_see_different_images(small: DatasetSource, make_cfg: MakeCfg) -> None:
    cfg = make_cfg(small, dataloader__aspect_ratio_grouping=False, solver__ims_per_batch=3)
    alone = [s.image_id for s in sum(take(build_train_loader(cfg)[0], 6), [])]
    shares = [
        [s.image_id for s in sum(take(build_train_loader(cfg, rank=rank, world_size=3)[0], 6), [])]
        for rank in range(3)
    ]
    assert [shares[i % 3][i // 3] for i in range(18)] == alone


def test_images_without_objects(small: DatasetSource, make_cfg: MakeCfg) -> None:
    def seen(**changes: Any) -> set[int]:
        return {s.image_id for s in sum(take(build_train_loader(make_cfg(small, **changes))[0], 12), [])}

    assert seen() == {2, 5, 7}
    assert seen(dataloader__filter_empty_annotations=False, **EVERYTHING) == {2, 5, 7, 11}


def test_batch_that_cannot_be_divided(small: DatasetSource, make_cfg: MakeCfg) -> None:
    with refusal("indivisible-batch", "IMS_PER_BATCH 2", "4 processes"):
        build_train_loader(make_cfg(small), world_size=4)
    with refusal("indivisible-batch", "IMS_PER_BATCH 3", "2 processes"):
        build_train_loader(make_cfg(small, solver__ims_per_batch=3), world_size=2)


def test_no_dataset(make_cfg: MakeCfg) -> None:
    with refusal("no-dataset", "DATASETS.TRAIN"):
        build_train_loader(make_cfg())


@pytest.mark.parametrize("filter_empty", [True, False])
def test_nothing_to_train_on(
    write_dataset: Callable, small_coco: dict, make_cfg: MakeCfg, filter_empty: bool
) -> None:
    small_coco["annotations"] = [a for a in small_coco["annotations"] if a["iscrowd"]]
    cfg = make_cfg(write_dataset(small_coco), dataloader__filter_empty_annotations=filter_empty)
    message = r"dataset small has no object to train on \(4 images, 1 crowd annotations\) .*; add annotations"
    with pytest.raises(UserError, match=message):
        build_train_loader(cfg)
    assert len(build_test_loader(cfg, "small")[0]) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_image_stops_with_one_line(small: DatasetSource, make_cfg: MakeCfg, num_workers: int) -> None:
    path = small.images / "5.png"
    path.write_bytes(path.read_bytes()[:500])
    cfg = make_cfg(small, dataloader__num_workers=num_workers)
    for loader in (build_train_loader(cfg)[0], build_test_loader(cfg, "small")[0]):
        with refusal("unreadable-image", "5.png") as caught:
            take(loader, 10)
        assert "\n" not in str(caught.value)


def test_missing_image_is_found_before_training(small: DatasetSource, make_cfg: MakeCfg) -> None:
    (small.images / "11.png").unlink()
    for build in (build_train_loader, lambda cfg: build_test_loader(cfg, "small")):
        with refusal("missing-image", "11.png"):
            build(make_cfg(small))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_loader_yields_every_image_in_order(
    small: DatasetSource, make_cfg: MakeCfg, num_workers: int
) -> None:
    cfg = make_cfg(small, dataloader__num_workers=num_workers, test__ims_per_batch=3)
    loader, dataset = build_test_loader(cfg, "small")
    batches = list(loader)
    assert [[s.image_id for s in batch] for batch in batches] == [[2, 5, 7], [11]]
    assert len(loader) == 2
    assert len(dataset) == 4
    first = batches[0][0]
    assert first.target is None
    assert first.original_size == (90, 60)
    assert first.image.shape == (3, 96, 64)
    parts = [build_test_loader(cfg, "small", rank=rank, world_size=3)[0] for rank in range(3)]
    assert [[s.image_id for batch in part for s in batch] for part in parts] == [[2, 5], [7], [11]]


def test_training_loader_is_endless(small: DatasetSource, make_cfg: MakeCfg) -> None:
    with pytest.raises(TypeError, match="endless"):
        len(build_train_loader(make_cfg(small))[0])


def test_real_config_has_the_keys_that_are_read(small: DatasetSource, repository: Path) -> None:
    from gn_detect.config import load_config

    register = f"{{small: {{annotations: {small.annotations}, images: {small.images}}}}}"
    cfg = load_config(
        None,
        [
            "DATASETS.REGISTER",
            register,
            "DATASETS.TRAIN",
            "['small']",
            "DATASETS.TEST",
            "['small']",
            "SOLVER.IMS_PER_BATCH",
            "2",
            "DATALOADER.NUM_WORKERS",
            "0",
            "INPUT.CROP.ENABLED",
            "True",
            "INPUT.MIN_SIZE_TRAIN",
            "[64]",
            "INPUT.COLOR_JITTER.ENABLED",
            "True",
            "MODEL.MASK_ON",
            "True",
        ],
    )
    assert resolve_dataset(cfg, "small").images == small.images
    assert len(take(build_train_loader(cfg)[0], 2)) == 2
    assert len(take(build_test_loader(cfg, "small")[0], 9)) == 4
    jittered = cfg.replace(
        {"INPUT.LARGE_SCALE_JITTER.ENABLED": True, "INPUT.LARGE_SCALE_JITTER.SIZE": [64, 64]}
    )
    assert take(build_train_loader(jittered)[0], 1)[0][0].image.shape == (3, 64, 64)


@pytest.mark.slow  # for the import of a new process
def test_a_program_ends_with_a_loader_left_open() -> None:
    """Its worker ignores the SIGTERM that Python sends before it waits for its processes."""
    program = """
import itertools
import torch
from gn_detect.data.loader import SampleLoader
from gn_detect.structures import Sample

sample = Sample(torch.zeros(3, 4, 4), 1, "a.png", (4, 4), None)
batches = iter(SampleLoader([sample], lambda: itertools.repeat([0]), None, 1, 0))
assert len(next(batches)) == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
