"""The operator as PyTorch sees it: on a GPU where there is one, else on the CPU by Triton's interpreter."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along on Linux")

from gn_detect.layers import Conv2d, GroupNorm
from gn_detect.ops import group_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dispatch = importlib.import_module("gn_detect.ops.group_norm")
operator = importlib.import_module("gn_detect.ops.group_norm_operator")


@pytest.fixture(autouse=True)
def use_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the GPU's way."""
    if DEVICE == "cpu":
        monkeypatch.setattr(
            dispatch,
            "_use_operator",
            lambda x: torch.compiler.is_compiling() or not dispatch._is_transformed(),
        )


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


class Block(nn.Module):
    """Convolution, norm, shortcut and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = Conv2d(8, 8, 3, padding=1, bias=False, norm=GroupNorm(4, 8), activation="relu")
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, residual=x)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of a sum of squares."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad((y * y).sum(), [x, *model.parameters()])]


def assert_all_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_tensors_of_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels take addresses: that of another device would be read on this one."""
    monkeypatch.setattr(operator, "kernels_run_on", lambda device: True)
    x, weight = random(2, 8, 5, 6), random(8)
    for elsewhere in (
        (weight.to("meta"), None, 1e-5, None),
        (weight, weight.to("meta"), 1e-5, None),
        (weight, None, 1e-5, x.to("meta")),
    ):
        with pytest.raises(RuntimeError, match="on one device, not on .* and meta"):
            operator.fused_group_norm(x, 4, *elsewhere, True)


@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernels", [True, False])
def test_opcheck(
    residual: bool, order: torch.memory_format, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch, of both implementations."""
    monkeypatch.setattr(operator, "kernels_run_on", lambda device: kernels)
    x, extra = (random(2, 8, 5, 6, seed=i).contiguous(memory_format=order) for i in range(2))
    weight, bias = random(8, seed=2), random(8, seed=3)
    for t in (x, extra, weight, bias):
        t.requires_grad_()
    arguments = (x, 4, weight, bias, 1e-5, extra if residual else None, True)
    torch.library.opcheck(torch.ops.gn_detect.group_norm.default, arguments)
    torch.library.opcheck(
        torch.ops.gn_detect.group_norm.default, (x.detach(), 4, None, None, 1e-5, None, False)
    )
    with torch.no_grad():
        y, statistics = torch.ops.gn_detect.group_norm(*arguments)
        saved = y if residual else None
        needs = [True, residual, True]
        arguments = (random(2, 8, 5, 6, seed=4), x, saved, weight, bias, statistics, True, needs)
        torch.library.opcheck(torch.ops.gn_detect.group_norm_backward.default, arguments)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("residual", [False, True])
def test_both_implementations_agree(
    order: torch.memory_format, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels, and PyTorch's operators where the kernels do not run."""
    found = []
    for kernels in (True, False):
        monkeypatch.setattr(operator, "kernels_run_on", lambda device, use=kernels: use)
        x, extra = (random(2, 8, 5, 6, seed=i).contiguous(memory_format=order) for i in range(2))
        leaves = [t.requires_grad_() for t in (x, extra, random(8, seed=2), random(8, seed=3))]
        y = group_norm(x, 4, leaves[2], leaves[3], residual=extra if residual else None, activation="relu")
        assert y.is_contiguous(memory_format=order)
        gradients = torch.autograd.grad((y * y).sum(), leaves, allow_unused=True)
        found.append([y.detach(), *(g for g in gradients if g is not None)])
    assert_all_close(found[0], found[1])


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    model, x = Block(), random(2, 8, 6, 5)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_all_close(step(compiled, x), step(model, x))
    other = random(3, 8, 7, 4)
    assert_all_close(step(compiled, other), step(model, other))


def test_compiled_graphs_call_the_operator_forward_and_backward() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    graphs: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(str([node.target for node in graph.graph.nodes]))
        return make_boxed_func(graph.forward)

    step(torch.compile(Block(), fullgraph=True, backend=aot_autograd(fw_compiler=note)), random(2, 8, 6, 5))
    assert len(graphs) == 2
    assert "gn_detect.group_norm'" in graphs[0]
    assert "native_group_norm" not in graphs[0]
    assert "gn_detect.group_norm_backward" in graphs[1]


def test_exports() -> None:
    model, x = Block(), random(2, 8, 6, 5)
    program = torch.export.export(model, (x,))
    assert any("gn_detect.group_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_and_statistics_in_float32(dtype: torch.dtype) -> None:
    x = random(2, 8, 9, 9, dtype=dtype) + 30
    weight, bias = random(8, seed=1), random(8, seed=2)
    with torch.autocast(DEVICE, dtype=dtype):
        y = group_norm(x, 2, weight, bias, activation="relu")
    assert y.dtype == dtype
    expected = nn.functional.group_norm(x.double(), 2, weight.double(), bias.double()).relu()
    torch.testing.assert_close(y.double(), expected, rtol=8e-3, atol=1e-3)


@pytest.mark.slow
def test_gradients_of_gradients() -> None:
    leaves = [
        random(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(2, 4, 2, 2)] * 2 + [(4,)] * 2)
    ]
    x, extra, weight, bias = (t.requires_grad_() for t in leaves)

    def everything(x: Tensor, extra: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(x, 2, weight, bias, residual=extra, activation="relu")

    assert torch.autograd.gradcheck(everything, (x, extra, weight, bias))
    assert torch.autograd.gradgradcheck(everything, (x, extra, weight, bias))

    def alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(x, 2, weight, bias, activation="relu")

    assert torch.autograd.gradcheck(alone, (x, weight, bias))
    assert torch.autograd.gradgradcheck(alone, (x, weight, bias))


def test_functional_transforms() -> None:
    weight, bias = random(4, seed=1), random(4, seed=2)

    def loss(x: Tensor) -> Tensor:
        return group_norm(x, 2, weight, bias, residual=x, activation="relu").square().sum()

    x = random(3, 2, 4, 3, 3)
    each = torch.stack([torch.func.grad(loss)(one) for one in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), each)
    leaf = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], each[0])
    tangent = torch.func.jvp(loss, (x[0],), (x[1],))[1]
    torch.testing.assert_close(tangent, (each[0] * x[1]).sum(), rtol=1e-4, atol=1e-4)


def test_checkpointing() -> None:
    model, x = Block(), random(2, 8, 6, 5)
    leaf = x.clone().requires_grad_()
    y = checkpoint(model, leaf, use_reentrant=False)
    again = [y.detach(), *torch.autograd.grad((y * y).sum(), [leaf, *model.parameters()])]
    assert_all_close(again, step(model, x))


def test_distributed_data_parallel(tmp_path: Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = Block(), random(2, 8, 6, 5)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(x).square().sum().backward()
        found = [p.grad for p in model.parameters()]
        assert_all_close(found, step(Block(), x)[2:])  # type: ignore[arg-type]
    finally:
        destroy_process_group()


def test_traced_and_watched_programs_see_the_operator() -> None:
    """A dispatch mode, such as the one that selective checkpointing uses, gets the operator's name."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    seen: list[str] = []
    x = random(2, 8, 6, 5).requires_grad_()
    with Watch():
        group_norm(x, 4).sum().backward()
    assert "gn_detect.group_norm.default" in seen
    assert "gn_detect.group_norm_backward.default" in seen


@pytest.mark.parametrize("shape", [(0, 8, 5, 6), (2, 8, 0, 6)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(shape, device=DEVICE, requires_grad=True), random(8).requires_grad_()
    y = group_norm(x, 4, weight, None, residual=x, activation="relu")
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape  # type: ignore[union-attr]
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("which", ["sliced", "transposed", "expanded", "channels-last slice"])
def test_strided_input(which: str) -> None:
    x = {
        "sliced": random(2, 8, 6, 9)[:, :, :, ::2],
        "transposed": random(2, 8, 5, 6).transpose(2, 3),
        "expanded": random(1, 8, 6, 5).expand(2, 8, 6, 5),
        "channels-last slice": random(2, 16, 6, 5).contiguous(memory_format=torch.channels_last)[:, :8],
    }[which]
    leaf = x.detach().requires_grad_()
    dense = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    results = []
    for t in (leaf, dense):
        y = group_norm(t, 4, residual=t, activation="relu")
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), t)])
    assert_all_close(*results)


def test_incoming_gradients_of_any_order() -> None:
    """A sum's gradient has no strides of its own, and a channels-first consumer's are not x's."""
    x = random(2, 8, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = group_norm(x, 4, activation="relu")
    expanded = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    dense = torch.autograd.grad(y, x, torch.ones(y.shape, device=DEVICE))[0]
    assert torch.equal(expanded, dense)
    assert dense.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (3,), (0, 1), (2, 3)])
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_for_some_inputs_only(needs: tuple[int, ...], relu: bool) -> None:
    leaves = [random(2, 8, 5, 6), random(2, 8, 5, 6, seed=1), random(8, seed=2), random(8, seed=3)]

    def gradients(wanted: tuple[int, ...]) -> dict[int, Tensor]:
        x, extra, weight, bias = (t.clone().requires_grad_(i in wanted) for i, t in enumerate(leaves))
        inputs = {i: (x, extra, weight, bias)[i] for i in wanted}
        y = group_norm(x, 4, weight, bias, residual=extra, activation="relu" if relu else None)
        return dict(zip(wanted, torch.autograd.grad(y.square().sum(), list(inputs.values())), strict=True))

    everything = gradients((0, 1, 2, 3))
    for i, gradient in gradients(needs).items():
        assert torch.equal(gradient, everything[i])


def test_modified_output_is_noticed() -> None:
    x = random(2, 8, 5, 6).requires_grad_()
    y = group_norm(x, 4, residual=x, activation="relu")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_mixed_precision_gradients_have_their_inputs_dtypes() -> None:
    x = random(2, 8, 5, 6, dtype=torch.bfloat16).requires_grad_()
    extra, weight = random(2, 8, 5, 6, seed=1).requires_grad_(), random(8, seed=2).requires_grad_()
    group_norm(x, 4, weight, residual=extra, activation="relu").sum().backward()
    assert (x.grad.dtype, extra.grad.dtype, weight.grad.dtype) == (x.dtype, extra.dtype, weight.dtype)  # type: ignore[union-attr]
