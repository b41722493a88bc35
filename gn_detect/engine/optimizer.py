"""The optimiser of a run, with detectron2's parameter groups, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import is_norm

if TYPE_CHECKING:
    from ..config import Config


def build_optimizer(cfg: Config, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW, as ``SOLVER.OPTIMIZER`` says, over the parameters that are trained.

    Each group has its rate before any schedule as ``initial_lr``.
    """
    solver = cfg.solver
    groups = parameter_groups(cfg, model)
    if solver.optimizer == "AdamW":
        return torch.optim.AdamW(groups, lr=solver.base_lr, betas=solver.betas, fused=True)
    # Without momentum there is nothing to look ahead with; torch refuses the combination.
    nesterov = solver.nesterov and solver.momentum > 0
    optimizer = torch.optim.SGD(
        groups, lr=solver.base_lr, momentum=solver.momentum, nesterov=nesterov, fused=True
    )
    if solver.momentum > 0:
        # PyTorch makes these in the first step, and leaves them uninitialised where that step is skipped.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step, or none where ``skip``, a scalar on the device, is not zero; nothing waits for the device.

    PyTorch's fused optimisers read these two attributes, which its ``GradScaler`` sets in the same way.
    """
    optimizer.grad_scale, optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def parameter_groups(cfg: Config, model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters by weight decay and learning rate, in the order of ``model.modules()``.

    ``WEIGHT_DECAY_NORM`` applies to the parameters of normalisations (0 by default, which the Group
    Normalization paper calls important), ``WEIGHT_DECAY_BIAS`` and ``BIAS_LR_FACTOR`` to whatever is named
    ``bias``, norms included; None means ``WEIGHT_DECAY`` or the norm's own. As in detectron2.
    """
    solver = cfg.solver
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            rate, decay = solver.base_lr, solver.weight_decay
            if is_norm(module):
                decay = solver.weight_decay_norm
            if name == "bias":
                rate *= solver.bias_lr_factor
                if solver.weight_decay_bias is not None:
                    decay = solver.weight_decay_bias
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def clip_gradients(cfg: Config, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Limit gradients in place as ``SOLVER.CLIP_GRADIENTS`` says; nothing waits for the device.

    ``value`` limits each element, ``norm`` the norm of each parameter by itself (both as in detectron2),
    ``full_model`` the norm of all gradients together.

    Returns:
        The norm of all gradients before that; it is finite where all of them are.
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
    return nn.utils.clip_grad_norm_(parameters, math.inf)  # which multiplies them by 1


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], origin: str) -> None:
    """Take over momenta from ``saved``, an optimiser's ``state_dict()``; rates and decays stay the config's.

    Args:
        origin: the checkpoint, for messages.

    Raises:
        UserError: ``saved`` belongs to other parameters or another kind of optimiser.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = (
        {"exp_avg", "exp_avg_sq", "step"} if isinstance(optimizer, torch.optim.AdamW) else {"momentum_buffer"}
    )
    state = optimizer.state_dict()
    momenta = saved.get("state", {})
    for index, values in momenta.items() if isinstance(momenta, dict) else [(-1, {})]:
        known = type(index) is int and 0 <= index < len(parameters) and isinstance(values, dict)
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)} if known else {}
        fits = known and set(tensors) in (set(), wanted)
        if not fits or not all(_fits(value, parameters[index]) for value in tensors.values()):
            raise UserError(
                f"the optimiser state in {origin} belongs to other settings; resume with the SOLVER and "
                f"MODEL keys of that run, or start anew from it with MODEL.WEIGHTS"
            )
        # Fused kernels walk through memory, so a momentum must lie there as its parameter does.
        state["state"][index] = {
            key: torch.empty_like(parameters[index]).copy_(value) if value.dim() else value.clone()
            for key, value in tensors.items()
        }
    optimizer.load_state_dict(state)


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """Return whether ``value`` can be a momentum of ``parameter``, or its number of steps."""
    plain = value.layout == torch.strided and not value.is_quantized and value.is_floating_point()
    return plain and (value.dim() == 0 or value.shape == parameter.shape)
