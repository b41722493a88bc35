"""Mixed precision, accumulation, averages, compilation, checkpointed activations: alone, and each resumed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gn_detect.config import Config
from gn_detect.data import build_train_loader
from gn_detect.engine import evaluate, step, train
from gn_detect.engine.step import make_state, train_step
from gn_detect.errors import UserError
from gn_detect.modeling import build_model
from gn_detect.weights import CheckpointMetadata
from tests.engine.chaos import differences

AMP = {
    "fp32": {},
    "bf16": {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"},
    "fp16": {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "float16"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "accumulate": {"SOLVER.ACCUMULATE": 2},
    "ema": {"SOLVER.EMA.ENABLED": True, "SOLVER.EMA.DECAY": 0.5},
    "compile": {"MODEL.COMPILE": True},
    "checkpointing": {"MODEL.BACKBONE.ACTIVATION_CHECKPOINTING": True},
}
CHOICES = [
    pytest.param(
        (amp, *others),
        id="-".join((amp, *others)),
        marks=[] if others == ("compile",) or len(others) == len(OTHERS) else [pytest.mark.exhaustive],
    )
    for amp in ("fp32", "bf16")  # float16 is bfloat16 on a CPU
    for count in range(len(OTHERS) + 1)
    for others in itertools.combinations(OTHERS, count)
]


def final(cfg: Config) -> dict[str, Any]:
    return torch.load(Path(cfg.output_dir) / "model_final.pth", weights_only=True)


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced, and run without the compiler, which takes minutes."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **keys: real(self, backend="eager", **keys))


def run_with_a_break(cfg: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The final checkpoint of a whole run, and of one that is resumed in the middle."""
    cfg = cfg.replace({"DATASETS.TEST": [], "SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2})
    train(cfg)
    expected, folder = final(cfg), Path(cfg.output_dir)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    (folder / "model_final.pth").unlink()
    train(cfg, resume=True)
    return final(cfg), expected


@pytest.mark.parametrize("amp", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_all_of_them_together_resume_exactly(tiny_config: Config, amp: str) -> None:
    """But for compilation, which takes its time: see the next test."""
    keys = AMP[amp] | OTHERS["accumulate"] | OTHERS["ema"] | OTHERS["checkpointing"]
    keys |= {"SOLVER.OPTIMIZER": "AdamW", "SOLVER.BASE_LR": 1e-4}
    keys |= {"MODEL.RESNETS.CONV": "WS", "MODEL.FPN.CONV": "StdConv"}
    found, expected = run_with_a_break(tiny_config.replace(keys))
    assert differences(found, expected) == []
    assert "scaler" not in expected
    assert "trained" in expected


@pytest.mark.slow
@pytest.mark.parametrize(("amp", "other"), [("fp32", "checkpointing"), ("bf16", "accumulate")])
def test_deformable_convolutions_resume_exactly(tiny_config: Config, amp: str, other: str) -> None:
    keys = AMP[amp] | OTHERS["ema"] | OTHERS[other]
    keys |= {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.WIDTH_PER_GROUP": 4}
    keys |= {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]}
    keys |= {"MODEL.RESNETS.DEFORM_MODULATED": amp == "bf16"}
    found, expected = run_with_a_break(tiny_config.replace(keys))
    assert differences(found, expected) == []
    offset = expected["model"]["backbone.bottom_up.res4.1.conv2_offset.weight"]
    assert offset.dtype == torch.float32
    assert offset.count_nonzero() > 0, "it begins at 0, and is trained"


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_every_combination_resumes_exactly(
    tiny_config: Config, choice: tuple[str, ...], eager_compiler: None
) -> None:
    keys = AMP[choice[0]] | {k: v for other in choice[1:] for k, v in OTHERS[other].items()}
    found, expected = run_with_a_break(tiny_config.replace(keys))
    assert differences(found, expected) == []
    assert "scaler" not in expected
    assert ("trained" in expected) == ("ema" in choice)


def one_step(cfg: Config, images: int = 2) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of the first step."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    loader, _ = build_train_loader(cfg)
    losses, _ = train_step(cfg, model, next(iter(loader)), make_state(cfg, model))
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointed_activations_change_nothing(tiny_config: Config) -> None:
    plain = one_step(tiny_config)
    assert differences(one_step(tiny_config.replace(OTHERS["checkpointing"])), plain) == []


def test_checkpointed_activations_refuse_running_statistics(tiny_config: Config) -> None:
    with pytest.raises(UserError, match="ACTIVATION_CHECKPOINTING.*running statistics"):
        tiny_config.replace(OTHERS["checkpointing"] | {"MODEL.RESNETS.NORM": "BN"})


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_is_close_to_float32(tiny_config: Config, amp: str) -> None:
    expected, _ = one_step(tiny_config)
    found, gradients = one_step(tiny_config.replace(AMP[amp]))
    for name, loss in expected.items():
        assert float(found[name]) == pytest.approx(float(loss), rel=0.05)
        assert float(found[name]) != float(expected["loss_cls"])
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_average_of_weights_is_what_is_saved_and_evaluated(tiny_config: Config) -> None:
    keys = OTHERS["ema"] | {"SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 1}
    cfg = tiny_config.replace(keys)
    results = train(cfg)
    name = "backbone.fpn_output2.weight"
    trained = [
        torch.load(Path(cfg.output_dir) / file, weights_only=True)["trained"][name]
        for file in ("model_0000000.pth", "model_0000001.pth", "model_final.pth")
    ]
    average = trained[0]
    for count, weight in enumerate(trained[1:], start=1):
        stays = min(0.5, (1 + count) / (10 + count))  # the first weights are soon forgotten
        average = stays * average + (1 - stays) * weight
    assert torch.allclose(final(cfg)["model"][name], average, atol=1e-7)
    path = str(Path(cfg.output_dir) / "model_final.pth")
    again = evaluate(cfg.replace({"MODEL.WEIGHTS": path, "OUTPUT_DIR": cfg.output_dir + "_again"}))
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)


def test_parts_that_do_not_divide_the_batch_are_refused(tiny_config: Config) -> None:
    with pytest.raises(UserError, match="SOLVER.ACCUMULATE: 3 must divide SOLVER.IMS_PER_BATCH"):
        tiny_config.replace({"SOLVER.ACCUMULATE": 3})


def test_float16_on_a_cpu_is_bfloat16_and_says_so(
    tiny_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """Its float16 convolutions take minutes for a step; a config made for a GPU runs, resumes and replays."""
    expected = one_step(tiny_config.replace(AMP["bf16"]))
    assert not caplog.records
    assert differences(one_step(tiny_config.replace(AMP["fp16"])), expected) == []
    (record,) = caplog.records
    assert "SOLVER.AMP.DTYPE is float16" in record.message
    assert "bfloat16 is used" in record.message


def test_a_run_in_float16_goes_on_on_a_cpu(tiny_config: Config) -> None:
    """A scaler's state, of a GPU, is in the checkpoint, and is not needed."""
    cfg = tiny_config.replace(AMP["fp16"])
    state = make_state(cfg, build_model(cfg))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    state.restore(CheckpointMetadata(**state.metadata(), scaler=scaler.state_dict()), "model.pth")
    assert not state.scaler.is_enabled()
    assert "scaler" not in state.metadata()


def test_on_a_gpu_the_dtype_is_as_set(tiny_config: Config) -> None:
    cuda = torch.device("cuda")
    for name, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16}.items():
        assert step.mixed_dtype(tiny_config.replace(AMP[name]), cuda) == dtype


def test_float16_gradients_that_overflow_lower_the_scale_and_skip_the_step(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "mixed_dtype", lambda cfg, device: torch.float16)  # as on a GPU
    cfg = tiny_config.replace(AMP["fp16"])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    state = make_state(cfg, model)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader, _ = build_train_loader(cfg)
    batch = next(iter(loader))
    _, broken = train_step(cfg, model, batch, state)
    assert not broken
    assert state.scaler.get_scale() == 2.0**39
    assert differences(dict(model.state_dict()), before) == []
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    train_step(cfg, model, batch, state)
    assert differences(dict(model.state_dict()), before) != []
    assert all(value.isfinite().all() for value in model.state_dict().values())
