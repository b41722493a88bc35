"""A GPU that is only pretended: its tensors compute on the CPU, and a trace lists what a GPU would do.

    with pretended_device() as trace:
        model = build_model(cfg).to(DEVICE)      # parameters whose device is cuda:0
        region = trace.record(lambda: model(images, targets))
    waits(region)       # Counter: (file, function) -> times that the host waits for the device
    copies(region)      # Counter: (file, function, "pageable" or "pinned") -> copies to the device
    launches(region)    # Counter: phase -> launched operators; a phase is a name of torch's record_function
    views(region)       # number of views and allocations, which launch nothing
    region == other     # operators, shapes, strides, dtypes and all other arguments: capturable if equal

Inside the ``with`` block Python sees a GPU: ``x.device``, ``x.is_cuda``, ``torch.cuda.is_available()``, and
``device=DEVICE`` in factories. So the code takes the path of the GPU, forward and backward, and mixed devices
raise an error as there. ``pin_memory()`` and ``is_pinned()`` of host tensors are pretended as well.

Autocast follows the GPU's lists of operators. With ``exact=False`` convolutions, matrix products, norms and
RoIAlign give zeros: where shapes are fixed, counts do not depend on values, and a step in bfloat16 takes many
minutes on a CPU.

The limits: C++ sees CPU tensors, so memory formats of results may differ from cuDNN's, and there are no
streams, events or graphs. Other threads than that of the block see no GPU. An
operator counts as one launch, though some launch several kernels; the fused norm counts as its plan says.
A copy with ``non_blocking`` is no wait, also from pageable memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function
from torch.utils._pytree import tree_flatten, tree_map_only
from torchvision.ops import roi_align

import gn_detect
from gn_detect.ops import group_norm_operator as norm_operator
from gn_detect.ops.group_norm_triton.plan import make_plan

DEVICE = torch.device("cuda", 0)
PACKAGE = Path(gn_detect.__file__).parent
LIBRARIES = (str(Path(torch.__file__).parent), "torchvision", __file__, mock.__file__)

# Operators whose result, or its shape, the host reads.
WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.bincount"}
WAITING |= {"aten._unique", "aten._unique2", "aten.unique_dim", "aten.unique_consecutive"}
WAITING |= {"aten.repeat_interleave", "torchvision.nms"}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_", "aten._unsafe_index"}
FREE = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"}
FREE |= {"aten._unsafe_view", "aten._local_scalar_dense"}  # a view in all but name, and a copy to the host
HEAVY = {"aten.convolution", "aten.convolution_backward", "aten.mm", "aten.addmm", "aten.bmm"}
HEAVY |= {"gn_detect.group_norm", "gn_detect.group_norm_backward"}
HEAVY |= {"gn_detect.roi_align", "gn_detect.roi_align_backward"}
HEAVY |= {"torchvision.deform_conv2d", "torchvision._deform_conv2d_backward"}
FROM_HOST = {torch.tensor, torch.as_tensor}  # functions whose data a copy brings


class Pretended(Tensor):
    """A tensor on the pretended device; ``host`` holds its values on the CPU."""

    host: Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Pretended], host: Tensor) -> Pretended:
        x: Pretended = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), dtype=host.dtype, device=host.device
        )
        x.host = host
        return x

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.host!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        operator = str(func.overloadpacket)
        hosted = [t for t in tensors if not isinstance(t, Pretended)]
        if any(t.dim() for t in hosted) and operator != "aten.copy_" and operator not in INDEXING:
            raise RuntimeError(f"{func}: all tensors must be on the same device, but some are on the CPU")
        if _active:
            _active[-1].note(func, args, kwargs, hosted)
        run = STAND_INS.get(operator, func)
        if operator in HEAVY and _active and not _active[-1].exact:
            run = _zeros(func)
        results = run(*_unwrap(args), **_unwrap(kwargs))
        # An operator in place returns its argument.
        same = {id(t.host) if isinstance(t, Pretended) else id(t): t for t in tensors}
        return tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else Pretended(t), results)


def _unwrap(tree: Any) -> Any:
    return tree_map_only(Pretended, lambda t: t.host, tree)


def _zeros(func: Any) -> Callable[..., Any]:
    """Return an operator whose results are zeros of the right shapes."""

    def run(*args: Any, **kwargs: Any) -> Any:
        shapes = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        results = func(*shapes[0], **shapes[1])
        # Both orders fit maps of one pixel: the first input decides.
        order = torch.contiguous_format if tree_flatten(args)[0][0].is_contiguous() else torch.preserve_format
        return tree_map_only(
            Tensor, lambda t: torch.zeros_like(t, device="cpu", memory_format=order), results
        )

    return run


def _pool(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    side: int,
    ratio: int,
    aligned: bool,
) -> Tensor:
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = torch.zeros(())
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        found = roi_align(feature.float(), rois, side, 1 / stride, ratio, aligned)
        pooled = torch.where((level == i)[:, None, None, None], found, pooled)
    order = torch.contiguous_format if features[0].is_contiguous() else torch.channels_last
    return pooled.to(features[0].dtype).contiguous(memory_format=order)


def _pool_backward(
    gradient: Tensor,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],
    ratio: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    rois, (_, channels, side, _) = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1), gradient.shape
    maps = []
    for i, (height, width, stride) in enumerate(zip(heights, widths, strides, strict=True)):
        own = torch.where((level == i)[:, None, None, None], gradient.float(), 0).contiguous()
        shape = side, side, images, channels, height, width, ratio, aligned
        found = torch.ops.torchvision._roi_align_backward(own, rois, 1 / stride, *shape)
        maps.append((found.permute(0, 2, 3, 1) if channels_last else found).flatten())
    return torch.cat(maps).to(gradient.dtype)


# Operators that have kernels for a GPU alone.
STAND_INS = {"gn_detect.roi_align": _pool, "gn_detect.roi_align_backward": _pool_backward}


HALF = {torch.bfloat16, torch.float16}
# Operators that autocast computes in float32 on a GPU, from ATen/autocast_mode.h.
IN_FLOAT32 = (
    *(
        "exp",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "pow.Tensor_Scalar",
        "reciprocal",
        "rsqrt",
        "softplus",
    ),
    *("layer_norm", "group_norm", "nll_loss", "l1_loss", "smooth_l1_loss", "mse_loss", "upsample_nearest2d"),
    *("upsample_bilinear2d", "binary_cross_entropy_with_logits"),
)
WITH_FLOAT32_RESULT = (
    "softmax.int",
    "log_softmax.int",
    "cumsum",
    "sum",
    "sum.dim_IntList",
    "linalg_vector_norm",
)


def _autocast_of_a_gpu() -> torch.library.Library:
    """Let autocast on the CPU follow the lists of a GPU until the result is destroyed."""
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    for name in (*IN_FLOAT32, *WITH_FLOAT32_RESULT):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, _autocast_kernel(operator, name in WITH_FLOAT32_RESULT))
    return library


def _autocast_kernel(operator: Any, sets_result: bool) -> Callable[..., Any]:
    outside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(outside):
            if sets_result and args[0].dtype in HALF:
                return operator(*args, **{"dtype": torch.float32} | kwargs)
            wide = tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF else t, (args, kwargs))
            return operator(*wide[0], **wide[1])

    return run


@dataclass(frozen=True)
class Event:
    """One operator, or one copy between host and device.

    Attributes:
        operator: namespace and name.
        arguments: (shape, strides, dtype) of tensors, the values of all else.
        phase: innermost part of the model or the step; ``"inputs"`` outside all of them.
        place: file and function of the innermost frame in gn_detect, else in the first file of no library.
        launches: operators that the device runs; 0 for views, allocations and copies.
        waits: the host waits for the device.
        copied_from: ``"pageable"`` or ``"pinned"`` for a copy to the device, else empty.
    """

    operator: str
    arguments: tuple[Any, ...]
    phase: str
    place: tuple[str, str]
    launches: int = 0
    waits: bool = False
    copied_from: str = ""


def waits(events: Sequence[Event]) -> Counter[tuple[str, str]]:
    """Return how often the host waits in each function."""
    return Counter(e.place for e in events if e.waits)


def copies(events: Sequence[Event]) -> Counter[tuple[str, str, str]]:
    """Return how often each function copies pageable or pinned memory to the device."""
    return Counter((*e.place, e.copied_from) for e in events if e.copied_from)


def launches(events: Sequence[Event]) -> Counter[str]:
    """Return the number of launched operators of each phase."""
    counts: Counter[str] = Counter()
    for event in events:
        counts[event.phase] += event.launches
    return counts


def views(events: Sequence[Event]) -> int:
    """Return the number of views and allocations."""
    return sum(not (e.launches or e.waits or e.copied_from) for e in events)


@dataclass
class Trace(TorchFunctionMode):
    """Every event since the block began; see :func:`pretended_device`."""

    exact: bool = True
    events: list[Event] = field(default_factory=list)
    phases: list[str] = field(default_factory=lambda: ["inputs"])
    pinned: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def record(self, region: Callable[[], object]) -> list[Event]:
        """Run a function and return its events."""
        begin = len(self.events)
        region()
        return self.events[begin:]

    def add(self, operator: str, arguments: Any = (), **what: Any) -> None:
        """Append an event at the present phase and place."""
        described = tree_map_only(Tensor, _describe, tree_flatten(arguments)[0])
        self.events.append(Event(operator, tuple(described), self.phases[-1], _place(), **what))

    def note(self, func: Any, args: Any, kwargs: Any, hosted: Sequence[Tensor]) -> None:
        """Append the event of an operator."""
        operator = str(func.overloadpacket)
        arguments = (args, kwargs)
        if operator == "aten.copy_" and hosted:
            waiting = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            origin = "" if hosted[0] is args[0] else self.kind(hosted[0])
            self.add(operator, arguments, waits=waiting, copied_from=origin)
            return
        if operator in INDEXING:
            indices = [t for t in args[1] if t is not None]
            for index in indices:
                if not isinstance(index, Pretended):
                    self.add("aten.copy_", index, waits=True, copied_from=self.kind(index))
            waiting = any(t.dtype in (torch.bool, torch.uint8) for t in indices)
        else:
            waiting = operator in WAITING and kwargs.get("output_size") is None
        self.add(operator, arguments, launches=_launches(func, args), waits=waiting)

    def kind(self, host: Tensor) -> str:
        """Return the kind of memory of a host tensor."""
        return "pinned" if host.untyped_storage().data_ptr() in self.pinned else "pageable"

    def pin(self, host: Tensor) -> Tensor:
        """Return a copy in memory that counts as pinned."""
        copy = host.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy.untyped_storage()
        return copy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        if func is Tensor.backward:
            if "gradient" in kwargs:
                kwargs["grad_tensors"] = kwargs.pop("gradient")
            with self:  # this mode is off inside this method, but holds in the backward of our functions
                return torch.autograd.backward(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.tolist, Tensor.numpy):
            return self._moved(func, *args, **kwargs)
        if func is Tensor.new_tensor and isinstance(x, Pretended):
            func, args, kwargs = torch.tensor, args[1:], {"dtype": x.dtype, "device": DEVICE} | kwargs
        if func in FROM_HOST and _is_ours(kwargs.get("device")) and not isinstance(args[0], Pretended):
            del kwargs["device"]
            return self._to_device(func(*args, **kwargs), False)
        if _is_ours(kwargs.get("device")):
            del kwargs["device"]
            kwargs.pop("pin_memory", None)
            made = func(*args, **kwargs)
            if isinstance(made, Pretended):  # as zeros_like, which has been noted
                return made
            operator = f"aten.{func.__name__}"
            self.add(operator, (args, kwargs), launches=int(operator not in FREE))
            return Pretended(made)
        if kwargs.pop("pin_memory", False):
            return self.pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _moved(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run a method that may change the device."""
        on_device = isinstance(x, Pretended)
        if func in (Tensor.tolist, Tensor.numpy):
            if on_device and func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            return func(self._to_host(x, False) if on_device else x, *args, **kwargs)
        copy = kwargs.pop("copy", False)
        if func is not Tensor.to:
            target, dtype = DEVICE if func is Tensor.cuda else torch.device("cpu"), None
            non_blocking, layout = kwargs.get("non_blocking", False), kwargs.get("memory_format")
        elif args and isinstance(args[0], Tensor):
            target, dtype, layout = args[0].device, args[0].dtype, kwargs.get("memory_format")
            non_blocking = kwargs.get("non_blocking", len(args) > 1 and args[1])
        else:
            target, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        if target is not None and _is_ours(target) != on_device:
            x, copy = (self._to_host if on_device else self._to_device)(x, non_blocking), False
        options = {} if layout is None else {"memory_format": layout}
        return Tensor.to(x, dtype or x.dtype, copy=copy, **options)

    def _to_device(self, host: Tensor, non_blocking: bool) -> Tensor:
        _check_no_gradient(host)
        self.add("aten._to_copy", host, waits=not non_blocking, copied_from=self.kind(host))
        return Pretended(host.detach().clone())

    def _to_host(self, x: Tensor, non_blocking: bool) -> Tensor:
        _check_no_gradient(x)
        self.add("aten._to_copy", x, waits=not non_blocking)
        host: Tensor = _unwrap(x).clone()
        return host


_active: list[Trace] = []


def _check_no_gradient(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("a pretended copy between devices has no gradient")


def _is_ours(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == DEVICE.type


def _describe(x: Tensor) -> Any:
    """Return what a captured graph fixes: the value of a number on the host, the shape of all else."""
    if not isinstance(x, Pretended) and x.dim() == 0:
        return x.item()
    return tuple(x.shape), x.stride(), x.dtype


def _place() -> tuple[str, str]:
    """Return file and function of the innermost frame in the package, else of one in no library."""
    frame: FrameType | None = sys._getframe(1)
    elsewhere = "", ""
    while frame is not None:
        name, in_package = _file(frame.f_code.co_filename)
        function = frame.f_code.co_name
        if name and not function.startswith("<"):  # a comprehension or a lambda
            if in_package:
                return name, function
            elsewhere = elsewhere if elsewhere[0] else (name, function)
        frame = frame.f_back
    return elsewhere


@cache
def _file(path: str) -> tuple[str, bool]:
    """Return the name of a file of code, empty in a library, and whether it belongs to the package."""
    if path.startswith(f"{PACKAGE}/"):
        return Path(path).relative_to(PACKAGE).as_posix(), True
    return "" if any(library in path for library in LIBRARIES) else Path(path).name, False


def _launches(func: Any, args: Any) -> int:
    operator = str(func.overloadpacket)
    returns = func._schema.returns
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if is_view or operator in FREE:
        return 0
    backward = operator == "gn_detect.group_norm_backward"
    if not (backward or operator == "gn_detect.group_norm") or args[0].numel() == 0:
        return 1
    x, groups = (args[1], args[5].shape[2]) if backward else args[:2]
    direction, last = "backward" if backward else "forward", norm_operator._is_channels_last(x)
    samples, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
    plan = make_plan(direction, samples, channels, pixels, groups, x.dtype.itemsize, last)
    return 1 if plan.one_launch else 2


@contextmanager
def pretended_device(exact: bool = True) -> Iterator[Trace]:
    """Let Python see a GPU inside the ``with`` block, and record what it is asked to do.

    Without ``exact`` the operators in ``HEAVY`` give zeros.
    """
    trace = Trace(exact)
    group = torch._C._group_tensors_by_device_and_dtype
    autocast, is_autocast_enabled = torch.autocast, torch.is_autocast_enabled
    get_autocast_dtype = torch.get_autocast_dtype

    def cpu(device: str = "cuda") -> str:
        return "cpu" if device == DEVICE.type else device

    def grouped(*args: Any) -> Any:
        lists = args[0]
        ours = any(isinstance(t, Pretended) for t in lists[0])
        return {(DEVICE if ours else key[0], key[1]): value for key, value in group(*args).items()}

    replaced: list[tuple[Any, str, Any]] = [
        (record_function, "__enter__", lambda self: trace.phases.append(_phase(self.name, trace.phases[-1]))),
        (record_function, "__exit__", lambda self, *_: trace.phases.pop() and None),
        (torch, "autocast", lambda device_type, *args, **kw: autocast(cpu(device_type), *args, **kw)),
        (torch, "is_autocast_enabled", lambda *device: is_autocast_enabled(cpu(*device))),
        (torch, "get_autocast_dtype", lambda device: get_autocast_dtype(cpu(device))),
        (torch._C, "_group_tensors_by_device_and_dtype", grouped),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "Stream", mock.Mock()),
        (torch.cuda, "graph_pool_handle", lambda: None),
        (torch.cuda, "stream", lambda stream: nullcontext()),
        (torch.cuda, "current_stream", mock.Mock()),
        (Tensor, "record_stream", lambda x, stream: None),
        (torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        (Tensor, "pin_memory", lambda host, *_: trace.pin(host)),
        (Tensor, "is_pinned", lambda x, *_: not isinstance(x, Pretended) and trace.kind(x) == "pinned"),
        (import_module("gn_detect.ops.group_norm"), "FUSED", True),
        (norm_operator, "kernels_run_on", lambda device: False),
        (import_module("gn_detect.ops.roi_align"), "kernels_run_on", lambda device: True),
        (import_module("gn_detect.modeling.static"), "kernels_run_on", lambda device: True),
        (torch.cuda, "device", lambda device: nullcontext()),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        for module in map(import_module, ("torch.optim.optimizer", "torch.utils._foreach_utils")):
            known = [*module._foreach_supported_types, Pretended]
            stack.enter_context(mock.patch.object(module, "_foreach_supported_types", known))
        library = _autocast_of_a_gpu()
        stack.callback(library._destroy)
        _active.append(trace)
        stack.callback(_active.pop)
        stack.enter_context(trace)
        yield trace


def _phase(name: str, present: str) -> str:
    """Return the phase inside a ``record_function`` of this name; PyTorch's own are no phases."""
    return present if "#" in name else "losses" if name.endswith("_losses") else name
