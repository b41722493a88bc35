"""The benchmark does real work and says where the time goes; no test looks at how long it took."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gn_detect.bench.norms import (
    LAYERS,
    VARIANTS,
    Layer,
    Timing,
    benchmark_norms,
    compare_steps,
    fewest_passes,
    implementations,
)
from gn_detect.bench.step import Workload, write_workload
from gn_detect.cli import main
from gn_detect.errors import UserError

SMALL = [
    *("--config-file", "quick/demo.yaml", "--size", "64", "96", "--objects", "3", "--iterations", "2"),
    *("MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "TEST.DETECTIONS_PER_IMAGE", "5"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
]


@pytest.mark.parametrize(
    ("mode", "parts"),
    [
        ("train", {"data", "backbone", "fpn", "rpn", "roi_heads", "losses", "backward", "optimizer"}),
        ("infer", {"data", "backbone", "fpn", "rpn", "roi_heads", "paste_masks"}),
    ],
)
def test_parts_of_a_step(
    mode: str, parts: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    assert main(["bench", mode, "--output", str(path), *SMALL]) == 0
    report = json.loads(path.read_text())
    assert set(report["parts"]) >= parts - {"losses"}
    assert all(ms > 0 for ms in report["parts"].values())
    assert len(report["seconds"]) == 2
    assert report["summary"] > 0
    printed = capsys.readouterr().out
    assert "one step, without data: median" in printed
    assert "backbone" in printed


def test_the_workload_is_the_same_each_time(tmp_path: Path) -> None:
    first = write_workload(tmp_path / "a", Workload(64, 96))
    second = write_workload(tmp_path / "b", Workload(64, 96))
    assert (first[0] == second[0]).all()
    assert first[0].shape == (1000, 4)
    assert (tmp_path / "a/1.png").read_bytes() == (tmp_path / "b/1.png").read_bytes()
    assert (tmp_path / "a/annotations.json").read_text() == (tmp_path / "b/annotations.json").read_text()


def test_the_norms_of_the_model() -> None:
    """69 norms of 335 million elements an image, of which the RoI heads' are 51 million."""
    assert sum(layer.count for layer in LAYERS.values()) == 69
    elements = sum(layer.count * torch.Size(layer.shape).numel() for layer in LAYERS.values())
    assert round(elements / 1e6) == 335


def test_passes_over_memory() -> None:
    """The fewest reads and writes: 2 + 3 on chip and 3 + 5 else, 3 + 5 and 4 + 7 with a residual and ReLU."""
    small, large, block = LAYERS["p5"], LAYERS["res2 shortcut, p2"], LAYERS["res2 conv3"]
    assert [fewest_passes(small, 2, True, backward) for backward in (False, True)] == [2, 5]
    assert [fewest_passes(large, 2, True, backward) for backward in (False, True)] == [3, 8]
    assert [fewest_passes(block, 2, True, backward) for backward in (False, True)] == [4, 11]


@pytest.mark.parametrize("layer", ["res5 conv3", "p5", "box head"])
def test_implementations_compute_the_same(layer: str) -> None:
    """But for frozen BN, which is another function."""
    shape = (2, *LAYERS[layer].shape[1:])
    x, residual = torch.randn(shape), torch.randn(shape) if LAYERS[layer].residual else None
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    functions = implementations(LAYERS[layer], x, compiled=False)
    ours, native = (functions[name](x, residual, weight, bias) for name in ("ours", "native"))
    torch.testing.assert_close(ours, native)
    assert functions["frozen BN"](x, residual, weight, bias).shape == ours.shape


def test_the_norm_is_timed_with_weights_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in float32. With others the operator converts their gradients, two launches a norm."""
    dtypes = {}

    def note(layer: Layer, x: Tensor, compiled: bool) -> dict[str, Callable[..., Tensor]]:
        found = implementations(layer, x, compiled)

        def named(name: str) -> Callable[..., Tensor]:
            def call(*inputs: Tensor) -> Tensor:
                dtypes[name] = inputs[2].dtype
                return found[name](*inputs)

            return call

        return {name: named(name) for name in found}

    monkeypatch.setattr("gn_detect.bench.norms.implementations", note)
    device = torch.device("cpu")
    list(benchmark_norms(device, layers=["p5"], dtypes=["bfloat16"], compiled=False, rounds=1))
    assert dtypes["ours"] == dtypes["autocast native"] == torch.float32
    assert dtypes["native"] == dtypes["frozen BN"] == torch.bfloat16


def test_norms_one_by_one() -> None:
    timings = list(benchmark_norms(torch.device("cpu"), layers=["p5"], compiled=False, rounds=1))
    assert len(timings) == 2 * 2 * 2
    for timing in timings:
        assert timing.bandwidth > 0
        assert all(seconds > 0 for seconds in timing.seconds.values())
        assert ("autocast native" in timing.seconds) == (timing.dtype == "bfloat16")


def test_bench_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "norms.json"
    some = ["--no-compile", "--layer", "p5", "--dtype", "float32", "--order", "channels_last"]
    command = ["bench", "norm", "--device", "cpu", "--iterations", "1", "--steps", "0", "--output", str(path)]
    assert main([*command, *some, "SOLVER.NO_KEY", "1"]) == 2, "config keys stand at the end, as everywhere"
    assert "SOLVER.NO_KEY: unknown key" in capsys.readouterr().err
    assert not path.exists()
    assert main([*command, *some, "SEED", "1"]) == 0
    printed = capsys.readouterr().out
    assert "p5" in printed
    assert "least against native" in printed
    figures = json.loads(path.read_text())
    assert [n["backward"] for n in figures["norms"]] == [False, True]
    assert figures["steps"] == {}


def test_figures_of_a_run_that_is_cut_off_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: object, **__: object) -> Iterator[Timing]:
        timings = benchmark_norms(torch.device("cpu"), layers=["p5"], compiled=False, rounds=1)
        yield next(timings)
        raise KeyboardInterrupt

    monkeypatch.setattr("gn_detect.bench.norms.benchmark_norms", cut_off)
    path = tmp_path / "norms.json"
    assert main(["bench", "norm", "--device", "cpu", "--output", str(path)]) == 130
    assert [norm["layer"] for norm in json.loads(path.read_text())["norms"]] == ["p5"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_norm_without_the_gpu_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "norm", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_training_steps_side_by_side() -> None:
    small = ["--size", "64", "96", "--objects", "3", "--iterations", "1", "MODEL.DEVICE", "cpu"]
    *_, steps = compare_steps("quick/demo.yaml", small, rounds=1)
    assert steps.keys() == VARIANTS.keys()
    for step in steps.values():
        assert step.seconds[0] > 0
        assert " MB (" in str(step)
    with pytest.raises(UserError, match="fused GN failed"):
        next(compare_steps("quick/demo.yaml", ["NO.SUCH_KEY", "1"], rounds=1))
