"""Several processes: scaled configs, refusals, and the same weights as with one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.pretended_device import DEVICE, copies, pretended_device, waits
from gn_detect.config import Config, load_config
from gn_detect.distributed import launch
from gn_detect.distributed.group import (
    check_synchronised_norms,
    gather,
    get_rank,
    mean_over_processes,
    parallelize,
)
from gn_detect.distributed.launch import check_launch
from gn_detect.engine import evaluate, train
from gn_detect.engine.optimizer import scale_config
from gn_detect.errors import UserError
from gn_detect.modeling import build_model
from gn_detect.weights import read_checkpoint
from tests.engine.tiny import make_dataset, write_config

RESULTS = "coco_instances_results.json"


def solver(cfg: Config) -> tuple[object, ...]:
    s = cfg.solver
    return (
        s.ims_per_batch, round(s.base_lr, 12), s.max_iter, s.steps, s.warmup_iters, s.checkpoint_period,
        cfg.test.eval_period, s.reference_world_size,
    )  # fmt: skip


@pytest.fixture
def for_eight() -> Config:
    """The example in detectron2's documentation of ``auto_scale_workers``."""
    keys = {
        "SOLVER.IMS_PER_BATCH": 16, "SOLVER.BASE_LR": 0.1, "SOLVER.REFERENCE_WORLD_SIZE": 8,
        "SOLVER.MAX_ITER": 5000, "SOLVER.STEPS": "(4000,)", "SOLVER.WARMUP_ITERS": 1000,
        "SOLVER.CHECKPOINT_PERIOD": 1000, "TEST.EVAL_PERIOD": 500,
    }  # fmt: skip
    return load_config(None, [str(item) for pair in keys.items() for item in pair])


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (16, (32, 0.2, 2500, (2000,), 500, 500, 250, 16)),
        (1, (2, 0.0125, 40000, (32000,), 8000, 8000, 4000, 1)),
        (3, (6, 0.0375, 13333, (10667,), 2667, 2667, 1333, 3)),
    ],
)
def test_scaled_to_the_processes_as_detectron2_does(
    for_eight: Config, processes: int, expected: tuple
) -> None:
    assert solver(scale_config(for_eight, processes)) == expected


def test_not_scaled_without_or_at_the_reference(for_eight: Config) -> None:
    assert scale_config(for_eight, 8) == for_eight
    free = for_eight.replace({"SOLVER.REFERENCE_WORLD_SIZE": 0})
    assert scale_config(free, 4) == free


def test_batch_that_the_reference_does_not_divide_is_refused(for_eight: Config) -> None:
    with pytest.raises(UserError, match="IMS_PER_BATCH 12"):
        scale_config(for_eight.replace({"SOLVER.IMS_PER_BATCH": 12}), 4)


@pytest.mark.parametrize("part", ["RESNETS", "FPN", "ROI_MASK_HEAD"])
def test_sync_bn_in_a_single_process_is_refused(tiny_config: Config, part: str) -> None:
    model = build_model(tiny_config.replace({f"MODEL.{part}.NORM": "SyncBN"}))
    with pytest.raises(UserError, match="SyncBN"):
        check_synchronised_norms(model, torch.device("cpu"))
    check_synchronised_norms(build_model(tiny_config), torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_gpus": 0}, "--num-gpus 0: it must be at least 1"),
        ({"num_gpus": -2}, "--num-gpus -2: it must be at least 1"),
        ({"num_machines": 0}, "--num-machines 0: it must be at least 1"),
        ({"num_machines": 2}, "--dist-url"),
        ({"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://127.0.0.1:1"}, "--machine-rank 2"),
        ({"num_gpus": 99, "device": "cuda"}, "--num-gpus 99"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(print, **{"device": "cpu", **flags})


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
@pytest.mark.parametrize("there", [0, 1, 2])
def test_more_gpus_than_there_are_are_refused(
    device: str, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, too; with MODEL.DEVICE cpu the number means processes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1"[: max(0, 2 * there - 1)])
    words = {0: "no GPUs", 1: "1 GPU", 2: "2 GPUs"}[there]
    limit = {0: "''", 1: "'0'", 2: "'0,1'"}[there]
    with pytest.raises(UserError) as caught:
        check_launch(device, 3)
    assert f"PyTorch finds {words} on this machine (CUDA_VISIBLE_DEVICES is {limit}); " in str(caught.value)
    assert "or add MODEL.DEVICE cpu for 3 processes on the CPU" in str(caught.value)
    check_launch("cpu", 3)
    check_launch(device, max(there, 1))


def test_single_process_runs_here() -> None:
    called: list[int] = []
    launch(called.append, (3,), device="cpu")
    assert called == [3]


class _Summed(nn.Module):
    """Keeps the inputs that its forward gets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("running", torch.zeros(2))
        self.inputs: list[torch.Tensor] = []

    def forward(self, images: list[torch.Tensor], boxes: list[torch.Tensor]) -> torch.Tensor:
        self.inputs = [*images, *boxes]
        return self.weight.sum()


@pytest.fixture
def fake_group() -> Iterator[None]:
    """Make this process the first of two that exchange nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_group")
def test_the_wrapper_passes_inputs_on_as_they_are() -> None:
    """On a GPU, too: the model brings a batch to its device in one copy, for which the host does not wait."""
    inputs = [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 5, 4, dtype=torch.uint8)]
    boxes = [torch.zeros(2, 4)]
    with pretended_device() as trace:
        model = _Summed().to(DEVICE)
        wrapped = parallelize(model)
        events = trace.record(lambda: wrapped(inputs, boxes))
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    assert wrapped.broadcast_buffers
    assert not waits(events)
    assert not copies(events)
    assert all(found is given for found, given in zip(model.inputs, inputs + boxes, strict=True))


def _talk_and_fail(folder: str) -> None:
    """Runs in each of two processes; one of them fails while the other waits for it."""
    assert gather(get_rank()) == [0, 1]
    mean = mean_over_processes(torch.tensor([float(get_rank())]))
    (Path(folder) / f"{get_rank()}.txt").write_text(str(float(mean)))
    gather(0)
    if get_rank() == 1:
        raise UserError("unreadable-image", "image 7 is damaged")
    gather(0)


@pytest.mark.slow
def test_processes_talk_and_a_user_error_in_one_ends_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^image 7 is damaged$"):
        launch(_talk_and_fail, (str(tmp_path),), device="cpu", num_gpus=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["0.5", "0.5"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_launch")
def test_two_processes_train_the_same_weights_as_one(tmp_path: Path) -> None:
    """All images are equal and all anchors and RoIs are taken, so that no share differs from the other."""
    data = make_dataset(tmp_path / "train", 4, same=True)
    val = make_dataset(tmp_path / "val", 3)
    keys = [
        "INPUT.RANDOM_FLIP", "none", "SOLVER.MAX_ITER", "3", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "5000",
        "MODEL.RPN.POSITIVE_FRACTION", "1.0", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "500",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0", "MODEL.FPN.CONV", "WS",
        "SOLVER.ACCUMULATE", "auto", "TEST.LOSS_IMAGES", "3",
    ]  # fmt: skip
    weights, evaluated, losses = [], [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        cfg = load_config(write_config(folder, data, val), keys)
        launch(train, (cfg,), device="cpu", num_gpus=processes)
        weights.append(read_checkpoint(folder / "run" / "model_final.pth").tensors)
        results = json.loads((folder / "run" / "inference" / "tiny_test" / RESULTS).read_text())
        losses.append(json.loads((folder / "run" / "results.json").read_text())["validation"])
        assert load_config(folder / "run" / "config.yaml").solver.accumulate == 1
        evaluated.append(sorted({result["image_id"] for result in results}))
    assert evaluated == [[1, 2, 3], [1, 2, 3]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    results = (folder / "run" / "results.json").read_bytes()
    (folder / "run" / "results.json").unlink()
    launch(partial(evaluate, resume=True), (cfg,), device="cpu", num_gpus=2)
    assert (folder / "run" / "results.json").read_bytes() == results
    start = build_model_like(cfg)
    moved = max(float((weights[0][k] - start[k]).abs().max()) for k in start)
    difference = max(float((weights[0][k] - weights[1][k]).abs().max()) for k in start)
    assert moved > 1e-3
    assert difference < 1e-3 * moved


def build_model_like(cfg: Config) -> dict[str, torch.Tensor]:
    """The weights with which the runs began."""
    torch.manual_seed(cfg.seed)
    return build_model(cfg).state_dict()
