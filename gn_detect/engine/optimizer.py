"""The optimiser of a run with detectron2's parameter groups, gradient clipping, and the learning rate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import is_norm
from ..modeling.freezing import check_patterns, fits, part_of

if TYPE_CHECKING:
    from ..config import Config


def build_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum or AdamW (``SOLVER.OPTIMIZER``) over the parameters that are trained.

    ``initial_lr`` of each group is its rate before any schedule.
    """
    solver = cfg.solver
    groups = parameter_groups(cfg, model)
    if solver.optimizer == "AdamW":
        return torch.optim.AdamW(groups, lr=solver.base_lr, betas=solver.betas, fused=True)
    nesterov = solver.nesterov and solver.momentum > 0  # torch refuses Nesterov without momentum
    optimizer = torch.optim.SGD(
        groups, lr=solver.base_lr, momentum=solver.momentum, nesterov=nesterov, fused=True
    )
    if solver.momentum > 0:
        # PyTorch makes these in the first step, and leaves them uninitialised if that step is skipped.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(cfg: Config, model: nn.Module) -> list[dict[str, Any]]:
    """Group trained parameters by weight decay and learning rate, in the order of ``model.modules()``.

    ``WEIGHT_DECAY_NORM`` applies to the parameters of normalisations (0 by default, which the Group
    Normalization paper calls important), ``WEIGHT_DECAY_BIAS`` and ``BIAS_LR_FACTOR`` to each parameter named
    ``bias``, norms included; None means ``WEIGHT_DECAY`` or the norm's own. The rules are detectron2's.
    ``LR_MULTIPLIERS`` are ours.

    Raises:
        UserError: a pattern of ``LR_MULTIPLIERS`` fits no parameter.
    """
    solver = cfg.solver
    check_patterns("SOLVER.LR_MULTIPLIERS", solver.lr_multipliers, model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            rate = solver.base_lr
            decay = solver.weight_decay_norm if is_norm(module) else solver.weight_decay
            if name == "bias":
                rate *= solver.bias_lr_factor
                if solver.weight_decay_bias is not None:
                    decay = solver.weight_decay_bias
            for pattern, factor in reversed(solver.lr_multipliers.items()):
                if fits(f"{prefix}.{name}", pattern):
                    rate *= factor
                    break
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def describe_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a table: the parameters of each part, how many of them are trained, and their learning rates."""
    rates = {p: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter)
    width = max(map(len, parts))
    lines = [f"{'part':<{width}}  parameters     trained  learning rate"]
    for part, parameters in parts.items():
        trained = [parameter for parameter in parameters if parameter in rates]
        counts = (sum(p.numel() for p in some) for some in (parameters, trained))
        shown = ", ".join(f"{rate:g}" for rate in sorted({rates[parameter] for parameter in trained}))
        lines.append(f"{part:<{width}}  " + "  ".join(f"{n:>10,}" for n in counts) + f"  {shown or '-':>13}")
    return "\n".join(lines)


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Take a step, or none if ``skip``, a scalar on the device, is not zero; do not wait for the device.

    PyTorch's fused optimisers read these two attributes, which its ``GradScaler`` sets in the same way.
    """
    optimizer.grad_scale, optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def clip_gradients(cfg: Config, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Clip gradients in place (``SOLVER.CLIP_GRADIENTS``); do not wait for the device.

    ``value`` limits each element, ``norm`` the norm of each parameter by itself (both as in detectron2),
    ``full_model`` the norm of all gradients together.

    Returns:
        The norm of all gradients before clipping; it is finite if and only if all of them are.
    """
    clip = cfg.solver.clip_gradients
    if clip.enabled and clip.clip_type == "full_model":
        return nn.utils.clip_grad_norm_(parameters, clip.clip_value, clip.norm_type)
    norm = _total_norm(parameters)
    if clip.enabled and clip.clip_type == "value":
        nn.utils.clip_grad_value_(parameters, clip.clip_value)
    elif clip.enabled:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, clip.clip_value, clip.norm_type)
    return norm


def _total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    if hasattr(nn.utils, "get_total_norm"):  # from PyTorch 2.6 on
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, math.inf)  # multiplies them by 1


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], origin: str) -> None:
    """Copy momenta from ``saved``, an optimiser's ``state_dict()``; rates and decays stay the config's.

    Raises:
        UserError: ``saved`` belongs to other parameters or another kind of optimiser. ``origin`` is its file.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_adam = isinstance(optimizer, torch.optim.AdamW)
    wanted = {"exp_avg", "exp_avg_sq", "step"} if is_adam else {"momentum_buffer"}
    state = optimizer.state_dict()
    momenta = saved.get("state", {})
    for index, values in momenta.items() if isinstance(momenta, dict) else [(-1, {})]:
        known = type(index) is int and 0 <= index < len(parameters) and isinstance(values, dict)
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)} if known else {}
        fits = known and set(tensors) in (set(), wanted)
        if not fits or not all(_fits(value, parameters[index]) for value in tensors.values()):
            raise UserError(
                "other-run",
                f"the optimiser state in {origin} belongs to other settings; resume with the SOLVER and "
                f"MODEL keys of that run, or start anew from it with MODEL.WEIGHTS",
            )
        # Fused kernels walk through memory, so a momentum needs the strides of its parameter.
        state["state"][index] = {
            key: torch.empty_like(parameters[index]).copy_(value) if value.dim() else value.clone()
            for key, value in tensors.items()
        }
    optimizer.load_state_dict(state)


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """Return whether ``value`` can be a momentum of ``parameter``, or its number of steps."""
    plain = value.layout == torch.strided and not value.is_quantized and value.is_floating_point()
    return plain and (value.dim() == 0 or value.shape == parameter.shape)


def learning_rate_factor(cfg: Config, iteration: int) -> float:
    """Return the factor of ``SOLVER.BASE_LR`` at an iteration, counted from 0; detectron2's numbers.

    Warm-up goes over ``WARMUP_ITERS`` iterations (at most ``MAX_ITER``) from ``WARMUP_FACTOR`` in a straight
    line to the schedule's value at its end, or stays at ``WARMUP_FACTOR`` with the method ``constant``. The
    iteration alone decides, so a resumed run has no state of the schedule to restore.
    """
    solver = cfg.solver
    warmup = min(solver.warmup_iters, solver.max_iter)
    if iteration >= warmup:
        return _schedule(cfg, iteration)
    if solver.warmup_method == "constant":
        return solver.warmup_factor
    return solver.warmup_factor + (_schedule(cfg, warmup) - solver.warmup_factor) * iteration / warmup


def _schedule(cfg: Config, iteration: int) -> float:
    """Return the factor without warm-up: steps, or half a cosine from 1 to ``BASE_LR_END / BASE_LR``."""
    solver = cfg.solver
    if solver.lr_scheduler_name == "WarmupMultiStepLR":
        return solver.gamma ** bisect_right(solver.steps, iteration)
    end = solver.base_lr_end / solver.base_lr
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * iteration / solver.max_iter))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of each group to ``factor`` times its ``initial_lr``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def scale_config(cfg: Config, world_size: int) -> Config:
    """Return a config, written for ``SOLVER.REFERENCE_WORLD_SIZE`` processes, for ``world_size`` of them.

    Images in each process stay as they are: the batch and the learning rate grow with the processes, the
    iterations, steps, warm-up and periods shrink (Goyal et al. 2017, arXiv 1706.02677). The rules, rounding
    included, are those of detectron2's ``auto_scale_workers``; a reference of 0 changes nothing.

    Raises:
        UserError: the batch cannot be divided by the reference.
    """
    solver, reference = cfg.solver, cfg.solver.reference_world_size
    if reference in (0, world_size):
        return cfg
    if solver.ims_per_batch % reference:
        raise UserError(
            "indivisible-batch",
            f"SOLVER.IMS_PER_BATCH {solver.ims_per_batch} is not divisible by SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}; correct one of them",
        )
    scale = world_size / reference
    return cfg.replace(
        {
            "SOLVER.IMS_PER_BATCH": round(solver.ims_per_batch * scale),
            "SOLVER.BASE_LR": solver.base_lr * scale,
            "SOLVER.MAX_ITER": round(solver.max_iter / scale),
            "SOLVER.WARMUP_ITERS": round(solver.warmup_iters / scale),
            "SOLVER.STEPS": [round(step / scale) for step in solver.steps],
            "SOLVER.CHECKPOINT_PERIOD": round(solver.checkpoint_period / scale),
            "TEST.EVAL_PERIOD": round(cfg.test.eval_period / scale),
            "SOLVER.REFERENCE_WORLD_SIZE": world_size,
        }
    )
