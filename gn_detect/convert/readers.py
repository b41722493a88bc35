"""Refuse modules that read the statistics of a BatchNorm inside them: it must stay one."""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from ..errors import UserError

STATISTICS = ("running_mean", "running_var")

_WRAPPERS = (types.MethodType, types.FunctionType, property, functools.cached_property, functools.partial)

_SEEN_AT_MOST = 500  # functions that one module's forward may reach


def refuse_readers(model: nn.Module, norms: Collection[str]) -> None:
    """Refuse a module whose forward reads the running statistics of a BatchNorm inside it.

    torch.ao's ConvBnReLU2d for quantization-aware training reads them, and so do modules that fold their norm
    into a convolution. With a GroupNorm they would fail or compute something else. They are found by the
    names in the code of ``forward`` and of the methods and functions that it calls.

    Args:
        norms: names of the BatchNorms to convert.

    Raises:
        UserError: names the module, its type, and the way to leave it out.
    """
    insides: dict[str, list[str]] = {}
    for norm in norms:
        parts = norm.split(".")
        for length in range(len(parts)):
            insides.setdefault(".".join(parts[:length]), []).append(norm)
    read: dict[Any, str | None] = {}
    for name in sorted(insides, key=len, reverse=True):  # the innermost first: it is the one that reads
        module = model.get_submodule(name)
        forward = _function(module.forward)
        if forward not in read:
            read[forward] = _statistics_in(forward, type(module))
        attribute = read[forward]
        if attribute is not None and not hasattr(module, attribute):  # not its own
            inside = insides[name][0]
            kind = type(module).__name__
            where = f"'{name}' is a {kind}, which" if name else f"the {kind}"
            pattern = f"{name}.*" if name else inside
            raise UserError(
                "unconvertible-norm",
                f"{where} reads the {attribute} of its BatchNorm '{inside}', and a GroupNorm has none; leave "
                f"it out with exclude={pattern!r}, or convert the model first, and fold or quantize it then",
            )


def _function(value: Any) -> Any:
    """Return the plain function in a bound method, a property, a partial or a decorated function."""
    for attribute in ("__func__", "fget", "func", "__wrapped__"):
        inner = getattr(value, attribute, None)
        if callable(inner) and isinstance(value, _WRAPPERS):
            return _function(inner)
    return value


def _statistics_in(forward: Any, kind: type) -> str | None:
    """Return the statistic that a function of a class, or one that it calls, reads; else None."""
    waiting: list[Any] = [forward]
    seen: set[Any] = set()
    while waiting and len(seen) < _SEEN_AT_MOST:
        function = _function(waiting.pop())
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        for code in _codes(function.__code__):
            names = {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
            if found := next((name for name in STATISTICS if name in names), None):
                return found
            for name in code.co_names:
                versions = [vars(place)[name] for place in kind.__mro__ if name in vars(place)]
                waiting += versions if "super" in code.co_names else versions[:1]
            waiting += _globals_of(code.co_names, function.__globals__)
    return None


def _globals_of(names: tuple[str, ...], known: dict[str, Any]) -> list[Any]:
    """Return the globals of these names, also those in modules, as in ``torch.nn.utils.fusion.fuse``."""
    found, modules = [], [known]
    for place in modules:  # grows
        for value in [place[name] for name in names if name in place]:
            found.append(value)
            if isinstance(value, types.ModuleType) and all(vars(value) is not other for other in modules):
                modules.append(vars(value))
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
