"""``group_norm`` with residual and ReLU against the formula of the paper in float64."""

from __future__ import annotations

import importlib
from importlib.util import find_spec, module_from_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_detect.layers import GroupNorm
from gn_detect.ops import group_norm


def formula(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Equations 1, 2 and 7 of the paper."""
    grouped = x.double().reshape(len(x), groups, -1)
    mean = grouped.mean(dim=2, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(dim=2, keepdim=True)
    normalized = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return normalized * weight.double().view(shape) + bias.double().view(shape)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (3, 8, 6, 7), (2, 8, 3, 4, 5)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_matches_the_formula(shape: tuple[int, ...], groups: int) -> None:
    if len(shape) == 2 and groups == 8:
        pytest.skip("one value in a group has no variance")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 1
    weight, bias = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    residual = torch.randn(shape, generator=generator)
    expected = formula(x, groups, weight, bias, 1e-5)
    torch.testing.assert_close(group_norm(x, groups, weight, bias).double(), expected, rtol=1e-4, atol=1e-5)
    fused = group_norm(x, groups, weight, bias, residual=residual, activation="relu")
    torch.testing.assert_close(fused.double(), (expected + residual).relu(), rtol=1e-4, atol=1e-5)


def test_gradients_and_inputs_survive_the_in_place_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
    )
    weight, bias = (
        torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
    )
    before = x.detach().clone(), residual.detach().clone()
    assert torch.autograd.gradcheck(
        lambda x, r, w, b: group_norm(x, 2, w, b, residual=r, activation="relu"), (x, residual, weight, bias)
    )
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_memory_format_and_empty_batch() -> None:
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    last = group_norm(x.contiguous(memory_format=torch.channels_last), 2, activation="relu")
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, group_norm(x, 2, activation="relu"), rtol=1e-5, atol=1e-5)
    assert group_norm(torch.zeros(0, 8, 5, 6), 2).shape == (0, 8, 5, 6)


def test_bad_arguments() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="None or 'relu', not 'gelu'"):
        group_norm(x, 2, activation="gelu")
    with pytest.raises(ValueError, match=r"residual has shape \(1, 4, 2, 3\), x has \(1, 4, 2, 2\)"):
        group_norm(x, 2, residual=torch.zeros(1, 4, 2, 3))


def test_channels_whose_pixels_32_bits_do_not_count_are_left_to_pytorch() -> None:
    """The kernels multiply and round up the number of pixels in 32 bits: beyond, no loop would run."""
    is_valid = importlib.import_module("gn_detect.ops.group_norm")._is_valid
    value = torch.zeros(1, dtype=torch.bfloat16)
    assert is_valid(value.expand(1, 1, 2**16 - 2**9 - 1, 2**15), 1, None, None)
    assert not is_valid(value.expand(1, 1, 2**16 - 2**9, 2**15), 1, None, None)
    assert not is_valid(value.expand(1, 1, 2**16, 2**15), 1, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "order", [torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format]
)
def test_dtypes_and_orders(dtype: torch.dtype, order: torch.memory_format) -> None:
    shape = (2, 8, 3, 5, 4) if order == torch.channels_last_3d else (2, 8, 9, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x[..., ::2] if order == torch.preserve_format else x.contiguous(memory_format=order)
    ones, zeros = torch.ones(8), torch.zeros(8)
    y = group_norm(x, 4, ones.to(dtype), zeros.to(dtype), residual=x, activation="relu")
    assert y.dtype == dtype
    assert order == torch.preserve_format or y.is_contiguous(memory_format=order)
    expected = (formula(x, 4, ones, zeros, 1e-5) + x.double()).relu()
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(y.double(), expected, rtol=2 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype(dtype: torch.dtype) -> None:
    """PyTorch's own returns float32 under autocast, and the tensors after it are twice as large."""
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, bias = torch.randn(8), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_norm(x, 2, weight, bias, residual=x)
    assert y.dtype == dtype
    expected = formula(x, 2, weight, bias, 1e-5) + x.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_one_element_in_a_group_is_refused_as_by_pytorch() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        group_norm(torch.randn(1, 4), 4)
    assert torch.equal(group_norm(torch.randn(2, 4), 4), torch.zeros(2, 4))


def test_compiles_whole_on_the_cpu() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))

    def f(x: Tensor) -> Tensor:
        return group_norm(x, 4, residual=x, activation="relu")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))


def test_vmap_over_the_residual_alone() -> None:
    x, residuals = torch.randn(2, 8, 3, 3), torch.randn(4, 2, 8, 3, 3)
    found = torch.func.vmap(lambda r: group_norm(x, 4, residual=r))(residuals)
    torch.testing.assert_close(found, torch.stack([group_norm(x, 4, residual=r) for r in residuals]))


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """``GN_DETECT_FUSED=0``, read when the module is imported."""
    spec = find_spec("gn_detect.ops.group_norm")
    assert spec is not None
    assert spec.loader is not None
    for value, expected in (("0", False), ("1", find_spec("triton") is not None)):
        monkeypatch.setenv("GN_DETECT_FUSED", value)
        again = module_from_spec(spec)
        spec.loader.exec_module(again)
        assert again.FUSED is expected


@pytest.mark.slow
class TestPyTorchsOwnSamples:
    """The inputs with which PyTorch tests its own, on the CPU's and the GPU's path."""

    @pytest.fixture(params=["native", "operator"])
    def path(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        pytest.importorskip("expecttest", reason="PyTorch's test inputs need it")
        if request.param == "operator":
            pytest.importorskip("triton")
            module = importlib.import_module("gn_detect.ops.group_norm")
            monkeypatch.setattr(module, "_use_operator", lambda x: True)
        return request.param

    # The interpreter takes seconds for each type; test_group_norm_kernels.py has all of them.
    @pytest.mark.parametrize(
        ("path", "dtype"),
        [
            *(("native", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
            *(("operator", dtype) for dtype in (torch.float32, torch.bfloat16)),
        ],
        indirect=["path"],
    )
    def test_operator(self, path: str, dtype: torch.dtype) -> None:
        from torch.testing._internal.common_methods_invocations import op_db

        info = next(o for o in op_db if o.name == "nn.functional.group_norm")
        seen = 0
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            groups, options = sample.args[0], dict(sample.kwargs)
            eps = options.pop("eps", 1e-5)
            inputs = {"x": sample.input} | options
            dy = torch.randn(sample.input.shape, generator=torch.Generator().manual_seed(seen)).to(dtype)
            results = []
            for function, precision in ((group_norm, dtype), (F.group_norm, torch.float64)):
                given = {k: v.detach().to(precision).requires_grad_() for k, v in inputs.items()}
                y = function(given["x"], groups, given.get("weight"), given.get("bias"), eps)
                results.append([y, *torch.autograd.grad(y, list(given.values()), dy.to(precision))])
            tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)
            for ours, exact in zip(*results, strict=True):
                torch.testing.assert_close(
                    ours.double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True
                )
            seen += 1
        assert seen > 10

    def test_module(self, path: str) -> None:
        from torch.testing._internal.common_modules import module_db

        info = next(m for m in module_db if m.module_cls is nn.GroupNorm)
        seen = 0
        for sample in info.module_inputs_func(info, "cpu", torch.float32, False, True):
            new = sample.constructor_input
            theirs, ours = nn.GroupNorm(*new.args, **new.kwargs), GroupNorm(*new.args, **new.kwargs)
            ours.load_state_dict(theirs.state_dict())
            given = sample.forward_input
            torch.testing.assert_close(ours(*given.args, **given.kwargs), theirs(*given.args, **given.kwargs))
            seen += 1
        assert seen >= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_of_another_type_does_not_change_xs(dtype: torch.dtype) -> None:
    """Eagerly, transformed and traced."""
    x, residual = torch.randn(2, 8, 3, 3).bfloat16(), torch.randn(2, 8, 3, 3, dtype=dtype)

    def compute(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return group_norm(x, 4, residual=residual, activation="relu")

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return compute(x, residual)

    expected = compute(x, residual)
    assert expected.dtype == torch.bfloat16
    transformed = torch.func.vmap(compute)(x[:, None], residual[:, None])[:, 0]
    exported = torch.export.export(Module(), (x, residual)).module()(x, residual)
    compiled = torch.compile(compute, backend="eager", fullgraph=True)(x, residual)
    for found in (transformed, exported, compiled):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected)
