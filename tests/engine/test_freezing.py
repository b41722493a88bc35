"""MODEL.FREEZE and SOLVER.LR_MULTIPLIERS: which parameters change, and by which rate."""

from __future__ import annotations

import torch

from gn_detect.config import Config
from gn_detect.engine.optimizer import build_optimizer, describe_parameters
from gn_detect.layers import FrozenBatchNorm2d
from gn_detect.modeling import make_model
from gn_detect.modeling.freezing import fits, part_of
from tests.refusal import refusal

STEM = "backbone.bottom_up.stem"


def test_names_modules_and_patterns() -> None:
    name = f"{STEM}.conv1.weight"
    assert all(fits(name, pattern) for pattern in (name, STEM, "backbone", "*.stem.*", "*.weight"))
    assert not any(fits(name, pattern) for pattern in ("backbone.bottom", "stem", "*.bias", f"{STEM}.conv"))
    assert part_of("backbone.fpn_lateral2.weight") == "backbone.fpn_*"
    assert part_of(f"{STEM}.conv1.norm.weight") == STEM
    assert part_of("roi_heads.box_head.0.fc1.weight") == "roi_heads.box_head"


def test_frozen_parts_have_no_gradient_and_keep_their_statistics(
    tiny_config: Config,
) -> None:
    cfg = tiny_config.replace(
        {"MODEL.RESNETS.NORM": "BN", "MODEL.FREEZE": ["backbone.bottom_up", "*.mask_head.*.bias"]}
    )
    model = make_model(cfg)
    for name, parameter in model.named_parameters():
        frozen = name.startswith("backbone.bottom_up.") or (".mask_head." in name and name.endswith(".bias"))
        assert parameter.requires_grad is not frozen, name
    assert isinstance(model.get_submodule(f"{STEM}.conv1.norm"), FrozenBatchNorm2d)
    some = make_model(cfg.replace({"MODEL.FREEZE": "*.conv1.weight"}))
    assert isinstance(some.get_submodule(f"{STEM}.conv1.norm"), torch.nn.BatchNorm2d)
    optimizer = build_optimizer(cfg, model)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for p in model.parameters() if p.requires_grad}


def test_rates_by_name(tiny_config: Config) -> None:
    factors = {"backbone": 0.1, "backbone.bottom_up.res5": 0.5, "*.bias": 2.0}
    cfg = tiny_config.replace({"SOLVER.LR_MULTIPLIERS": factors, "SOLVER.BASE_LR": 0.01})
    model = make_model(cfg)
    optimizer = build_optimizer(cfg, model)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        factor = 2.0 if name.endswith(".bias") else 0.1 if name.startswith("backbone.") else 1.0
        if name.startswith("backbone.bottom_up.res5") and not name.endswith(".bias"):
            factor = 0.5
        assert abs(rates[parameter] - 0.01 * factor) < 1e-12, name
    table = describe_parameters(model, optimizer).splitlines()
    row = next(line for line in table if line.startswith("backbone.bottom_up.res5"))
    count = sum(p.numel() for p in model.get_submodule("backbone.bottom_up.res5").parameters())
    assert row.split()[1:] == [f"{count:,}", f"{count:,}", "0.005,", "0.02"]


def test_a_pattern_that_fits_nothing_is_refused(tiny_config: Config) -> None:
    with refusal("no-such-module", "MODEL.FREEZE", "backbone.bottom_up.layer1", "backbone.bottom_up.res2"):
        make_model(tiny_config.replace({"MODEL.FREEZE": ["backbone.bottom_up.layer1"]}))
    with refusal("conflicting-keys", "MODEL.FREEZE"):
        make_model(tiny_config.replace({"MODEL.FREEZE": ["*"]}))
    cfg = tiny_config.replace({"SOLVER.LR_MULTIPLIERS": {"backbon": 0.1}})
    with refusal("no-such-module", "SOLVER.LR_MULTIPLIERS", "backbon"):
        build_optimizer(cfg, make_model(cfg))
