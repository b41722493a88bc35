"""``SOLVER.ACCUMULATE auto``: a dry step measures the memory, and leaves everything as it was."""

from __future__ import annotations

import json
import logging
import resource
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.pretended_device import DEVICE, pretended_device
from gn_detect.config import Config, load_config
from gn_detect.data import CocoDataset, build_train_loader
from gn_detect.data.augmentation import build_augmentations
from gn_detect.data.datasets import DatasetSource
from gn_detect.data.transforms import LabelledImage
from gn_detect.engine import memory, train
from gn_detect.engine.run import prepare
from gn_detect.engine.step import TrainingState, make_state, memory_help, train_step
from gn_detect.modeling import build_model
from gn_detect.weights import read_checkpoint
from tests.refusal import refusal

GB = 2**30
LARGE = {
    "INPUT.MIN_SIZE_TRAIN": [256],
    "INPUT.MAX_SIZE_TRAIN": 320,
    "SOLVER.IMS_PER_BATCH": 6,
    # oneDNN 3.12 of PyTorch 2.14.1 crashes in the backward pass of 8 channels and images of this size.
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
}


def differing(first: Any, second: Any, name: str = "") -> list[str]:
    """Names of the values of two nested states that are not equal to the bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return [each for key in first for each in differing(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, list):
        return differing(dict(enumerate(first)), dict(enumerate(second)), name)
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [name]


KINDS = {
    "sgd": {},
    "adam, average, BN": {
        "SOLVER.OPTIMIZER": "AdamW",
        "SOLVER.EMA.ENABLED": True,
        "MODEL.RESNETS.NORM": "BN",
        "SOLVER.AMP.ENABLED": True,
    },
}


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_training_is_the_same_to_the_bit_with_a_dry_step(
    tiny_config: Config, tmp_path: Path, keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = {}
    for number in (1, "auto"):
        folder = tmp_path / str(number)
        changes = {"SOLVER.ACCUMULATE": number, "SOLVER.MAX_ITER": 2, "OUTPUT_DIR": str(folder)}
        with caplog.at_level(logging.INFO, logger="gn_detect"):
            train(tiny_config.replace({**keys, **changes, "DATASETS.TEST": []}))
        checkpoint = read_checkpoint(folder / "model_final.pth")
        found[number] = {"model": checkpoint.tensors, "optimizer": checkpoint.metadata.optimizer}
        found[number]["trained"] = checkpoint.metadata.trained
        found[number]["losses"] = [
            {name: value for name, value in json.loads(line).items() if "loss" in name}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        assert load_config(folder / "config.yaml").solver.accumulate == 1
    assert differing(found[1], found["auto"]) == []
    lines = [record.message for record in caplog.records if record.name == memory.__name__]
    assert len(lines) == 1
    assert "2 images of 80 x 64 pixels" in lines[0]


def test_the_dry_step_leaves_every_state(tiny_config: Config) -> None:
    cfg = tiny_config.replace({**KINDS["adam, average, BN"], "SOLVER.ACCUMULATE": "auto"})
    _, dataset = build_train_loader(cfg)
    model = build_model(cfg).train()
    state = make_state(cfg, model)

    def everything() -> dict[str, Any]:
        return {
            "model": {name: value.clone() for name, value in model.state_dict().items()},
            "gradients": [p.grad is None for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "optimizer": state.optimizer.state_dict(),
            "average": {name: value.clone() for name, value in state.average.state_dict().items()},
            "random": torch.get_rng_state(),
            "limit": resource.getrlimit(resource.RLIMIT_DATA),
        }

    before = everything()
    assert memory.with_measured_parts(cfg, state, dataset).solver.accumulate == 1
    assert differing(before, everything()) == []


Parts = tuple[Config, TrainingState, CocoDataset]


@pytest.fixture
def parts(tiny_config: Config) -> Parts:
    """A batch of 6 images of 256 x 320 pixels."""
    cfg = tiny_config.replace({**LARGE, "SOLVER.ACCUMULATE": "auto"})
    return cfg, make_state(cfg, build_model(cfg).train()), build_train_loader(cfg)[1]


def test_a_part_takes_less_memory_than_the_whole(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine: the peak of 6 images, of 1, and a choice with the memory between the two."""
    cfg, state, dataset = parts
    weights = [p.clone() for p in state.trained]

    def peak(images: int, limit: float = 64 * GB) -> float:
        part = partial(memory.largest_batch, cfg, dataset, images, (256, 320))
        return memory.peak_of_step(cfg.replace({"SOLVER.ACCUMULATE": 6 // images}), state, part, limit)

    six, one = peak(6), peak(1)
    assert six - one > 40e6  # the stem's output alone takes 1 MB for an image
    assert peak(6, limit=one + 10e6) == float("inf")
    assert peak(6) == pytest.approx(six, abs=150e6)  # and everything works again
    monkeypatch.setattr(memory, "available", lambda device: (six + one) / 2 / 0.9)
    assert memory.with_measured_parts(cfg, state, dataset).solver.accumulate in (2, 3, 6)
    monkeypatch.setattr(memory, "available", lambda device: GB / 8)
    with refusal("out-of-memory", "1 image of 320 x 256", "MODEL.FREEZE", "ACTIVATION_CHECKPOINTING"):
        memory.with_measured_parts(cfg, state, dataset)
    assert all(torch.equal(p, before) for p, before in zip(state.trained, weights, strict=True))


def pretend(monkeypatch: pytest.MonkeyPatch, images: float) -> None:
    """Let there be memory for so many images of 256 x 320 pixels."""
    monkeypatch.setattr(memory, "available", lambda device: images * 256 * 320 / 0.9)
    taken = lambda cfg, state, part, limit: sum(s.image[0].numel() for s in part())  # noqa: E731
    monkeypatch.setattr(memory, "peak_of_step", taken)


def test_the_least_parts_that_fit(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, 3.5)
    with caplog.at_level(logging.INFO, logger=memory.__name__):
        assert memory.with_measured_parts(*parts).solver.accumulate == 2
    (line,) = caplog.messages  # what was measured, and the choice
    assert all(what in line for what in ("6 images of 320 x 256", "3 images of 320 x 256"))
    assert line.endswith("SOLVER.ACCUMULATE 2")
    pretend(monkeypatch, 1)
    assert memory.with_measured_parts(*parts).solver.accumulate == 6
    pretend(monkeypatch, 0.3)
    with refusal("out-of-memory", "INPUT.MIN_SIZE_TRAIN [128] INPUT.MAX_SIZE_TRAIN 160, which fit"):
        memory.with_measured_parts(*parts)


def test_an_allocator_that_refuses_is_no_failure(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a GPU, whose error names the batch."""
    cfg, state, dataset = parts
    work, seen = memory.forward_backward, []

    def refuse(cfg: Config, state: TrainingState, part: Any, *inputs: Any) -> Any:
        seen.append(len(part))
        with memory_help(cfg, part, "in the forward pass"):
            if len(part) > 3:
                raise torch.cuda.OutOfMemoryError
        return work(cfg, state, part, *inputs)

    monkeypatch.setattr(memory, "forward_backward", refuse)
    assert memory.with_measured_parts(cfg, state, dataset).solver.accumulate == 2
    assert seen == [6, 3, 3]


def test_nothing_is_written_if_nothing_fits(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    with refusal("out-of-memory", "80 x 64"):
        train(tiny_config.replace({"SOLVER.ACCUMULATE": "auto"}))
    assert not Path(tiny_config.output_dir).exists()
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_other_errors_are_not_taken_for_too_little_memory(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(memory, "forward_backward", fail)
    with pytest.raises(RuntimeError, match="multiplied"):
        memory.with_measured_parts(*parts)


def test_a_resumed_run_keeps_the_number(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config.replace({"SOLVER.ACCUMULATE": "auto", "SOLVER.MAX_ITER": 2, "DATASETS.TEST": []})
    with monkeypatch.context() as patched:
        patched.setattr(memory, "peak_of_step", lambda cfg, state, part, limit: len(part()) * limit / 1.5)
        train(cfg)
    folder = Path(cfg.output_dir)
    assert load_config(folder / "config.yaml").solver.accumulate == 2
    train(cfg.replace({"SOLVER.MAX_ITER": 3}), resume=True)  # with memory for both images
    assert load_config(folder / "config.yaml").solver.accumulate == 2


def test_the_processes_of_a_run_and_its_parts_share_a_batch(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two processes, one of which has less memory: both take its number."""
    monkeypatch.setattr(memory, "world_size", lambda: 2)
    monkeypatch.setattr(memory, "peak_of_step", lambda cfg, state, part, limit: 1.0 * len(part()))
    monkeypatch.setattr(memory, "gather", lambda value: [value, 3.0 if value > 100 else value])
    cfg = tiny_config.replace({"SOLVER.ACCUMULATE": "auto", "SOLVER.IMS_PER_BATCH": 12})
    _, dataset = build_train_loader(cfg)
    state = make_state(cfg, build_model(cfg))
    assert memory.with_measured_parts(cfg, state, dataset).solver.accumulate == 2  # of 6 images


def test_graphs_and_synchronised_norms_are_refused(tiny_config: Config) -> None:
    with refusal("conflicting-keys", "SOLVER.ACCUMULATE", "CUDA_GRAPHS"):
        tiny_config.replace({"SOLVER.ACCUMULATE": "auto", "SOLVER.CUDA_GRAPHS": True})
    cfg = tiny_config.replace({"SOLVER.ACCUMULATE": "auto", "MODEL.RESNETS.NORM": "SyncBN"})
    _, dataset = build_train_loader(cfg)
    with refusal("conflicting-keys", "SOLVER.ACCUMULATE", "SyncBN"):
        memory.with_measured_parts(cfg, make_state(cfg, build_model(cfg)), dataset)


def dataset_of(folder: Path, sizes: list[tuple[int, int]]) -> CocoDataset:
    """One object in each image of (height, width) but the last; the files do not exist."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
        for i, (height, width) in enumerate(sizes)
    ]
    annotations = [
        {
            "id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": 64, "bbox": [1, 1, 8, 8],
            "segmentation": [[1, 1, 9, 1, 9, 9]],
        }
        for i in range(len(sizes) - 1)
    ]  # fmt: skip
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    file = folder / "sizes.json"
    file.write_text(json.dumps(content))
    return CocoDataset(DatasetSource("sizes", file, folder))


@pytest.mark.parametrize(
    ("keys", "images", "shape"),
    [
        ({}, 2, (100, 180)),  # wide images with each other
        ({"DATALOADER.ASPECT_RATIO_GROUPING": False}, 2, (150, 180)),
        ({"DATALOADER.ASPECT_RATIO_GROUPING": False}, 1, (100, 180)),
        ({"INPUT.MIN_SIZE_TRAIN": [80, 60]}, 1, (80, 144)),
        ({"INPUT.MAX_SIZE_TRAIN": 120}, 2, (120, 80)),
        ({"DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}, 1, (100, 200)),
        ({"INPUT.LARGE_SCALE_JITTER.ENABLED": True, "INPUT.LARGE_SCALE_JITTER.SIZE": [96, 64]}, 2, (96, 64)),
        ({"INPUT.ROTATE_90": True}, 2, (180, 180)),  # a turned image beside one that is not
    ],
)
def test_the_largest_shape(tmp_path: Path, keys: dict[str, Any], images: int, shape: tuple[int, int]) -> None:
    cfg = load_config().replace({"INPUT.MIN_SIZE_TRAIN": [100], "INPUT.MAX_SIZE_TRAIN": 200, **keys})
    dataset = dataset_of(tmp_path, [(50, 90), (60, 40), (20, 40)])
    assert memory.largest_shape(cfg, dataset, images) == shape


CROPS = [
    ("relative", [0.5, 0.9]),
    ("relative_range", [0.4, 0.3]),
    ("absolute", [20, 60]),
    ("absolute_range", [16, 70]),
]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("kind", "size"), CROPS)
def test_no_augmented_image_is_larger(tmp_path: Path, kind: str, size: list[float], grouped: bool) -> None:
    crop = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": kind, "INPUT.CROP.SIZE": size}
    sizes = {"INPUT.MIN_SIZE_TRAIN": [40, 64], "INPUT.MAX_SIZE_TRAIN": 100}
    cfg = load_config().replace({**crop, **sizes, "DATALOADER.ASPECT_RATIO_GROUPING": grouped})
    files = [(50, 90), (60, 40), (33, 34), (20, 20)]
    dataset = dataset_of(tmp_path, files)
    largest = np.array(memory.largest_shape(cfg, dataset, 2))
    random = np.random.default_rng(0)
    found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for height, width in files[:-1] * 20:
        labelled = LabelledImage(
            np.zeros((height, width, 3), np.uint8), np.array([[1.0, 1.0, 9.0, 9.0]]), np.zeros(1, int), None
        )
        for augment in build_augmentations(cfg):
            labelled = augment(labelled, random)
        found[grouped and width > height].append(labelled.size)
    batches = [np.array(group).max(axis=0) for group in found.values() if group]
    assert max(batch.prod() for batch in batches) <= largest.prod()
    assert largest.prod() <= 2 * max(batch.prod() for batch in batches)


def test_limits_of_control_groups(tmp_path: Path) -> None:
    def write(folder: str, **values: object) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (tmp_path / folder / name.replace("__", ".")).write_text(f"{value}\n")

    write("proc/self", cgroup="4:memory:/jobs/one\n2:cpu:/other\n0::/user/two")
    write(
        "sys/fs/cgroup/user", memory__max=5000, memory__current=700, memory__stat="anon 9\ninactive_file 200"
    )
    write("sys/fs/cgroup/user/two", memory__max="max", memory__current=600, memory__stat="inactive_file 1")
    one = {"memory__limit_in_bytes": 900, "memory__usage_in_bytes": 400}
    write("sys/fs/cgroup/memory/jobs/one", **one, memory__stat="inactive_file 1\ntotal_inactive_file 100")
    assert sorted(memory.cgroup_limits(tmp_path)) == [(900, 300), (5000, 500)]
    assert list(memory.cgroup_limits(tmp_path / "none")) == []


def test_a_limit_of_the_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    resident, _ = memory._memory_now()
    free = memory.available(cpu) - resident
    assert free > 0
    monkeypatch.setattr(memory, "cgroup_limits", lambda: iter([(3 * GB, 3 * GB - 5000), (9 * GB, 0)]))
    assert 0 <= memory.available(cpu) - resident - 5000 < GB / 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert memory.available(cpu) - resident < GB / 4


def test_the_path_of_a_gpu(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: the model computes on the CPU, and the allocator's numbers are made up."""
    cfg = tiny_config.replace(
        {"MODEL.DEVICE": "cuda", "SOLVER.ACCUMULATE": "auto", "SOLVER.IMS_PER_BATCH": 1}
    )
    _, dataset = build_train_loader(cfg)
    calls: list[str] = []
    answers = {
        "reset_peak_memory_stats": None, "max_memory_allocated": 100 * 2**20, "memory_reserved": 30 * 2**20,
        "mem_get_info": (90 * 2**20, GB), "empty_cache": None, "get_rng_state": None, "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():
        note = lambda *_, name=name, answer=answer: (calls.append(name), answer)[1]  # noqa: E731
        monkeypatch.setattr(torch.cuda, name, note)
    with pretended_device():
        state = make_state(cfg, build_model(cfg).to(DEVICE).train())
        assert state.broken.device == DEVICE
        assert memory.with_measured_parts(cfg, state, dataset).solver.accumulate == 1  # 100 of 108 MB
        assert all(p.grad is None for p in state.trained)
    first = ["get_rng_state", "reset_peak_memory_stats", "max_memory_allocated", "reset_peak_memory_stats"]
    assert calls[2:8] == [*first, "set_rng_state", "empty_cache"]


@pytest.mark.gpu
def test_on_a_gpu_the_measured_peak_is_that_of_a_training_step(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config.replace({**LARGE, "MODEL.DEVICE": "cuda", "SOLVER.ACCUMULATE": "auto"})
    run = prepare(cfg, False)
    assert run.cfg.solver.accumulate == 1
    batch = memory.largest_batch(run.cfg, run.dataset, 6, (256, 320))
    peak = memory.peak_of_step(run.cfg, run.state, lambda: batch, float("inf"))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        train_step(run.cfg, run.model, batch, run.state)
    assert torch.cuda.max_memory_allocated() == pytest.approx(peak, rel=0.1)
    torch.cuda.set_per_process_memory_fraction(peak / 2 / torch.cuda.mem_get_info()[1])
    try:  # an out-of-memory error of the allocator itself
        assert memory.peak_of_step(run.cfg, run.state, lambda: batch, float("inf")) == float("inf")
        assert memory.with_measured_parts(cfg, run.state, run.dataset).solver.accumulate > 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
