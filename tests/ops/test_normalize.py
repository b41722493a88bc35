"""Normalisation of packed images: the kernel, on a CPU by Triton's interpreter, and the operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gn_detect.modeling.inputs import send
from gn_detect.modeling.static import pad_targets
from gn_detect.ops import normalize, normalize_images

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
STD = torch.tensor([57.375, 1.0, 58.395]).view(3, 1, 1)

CASES = [
    ([(5, 7)], (8, 32)),
    ([(12, 20), (7, 1), (1, 19)], (12, 20)),
    ([(3, 1100), (2, 1050)], (3, 1100)),  # wider than a block
]


def make_images(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *s), dtype=torch.uint8, generator=generator) for s in sizes]


def pack(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Send images as training does, with targets after them in the buffer."""
    buffer, places, _ = send(images, pad_targets([], [], (32, 32), with_masks=True), DEVICE)
    return buffer, places


def expected(images: list[Tensor], size: tuple[int, int]) -> Tensor:
    batch = torch.zeros(len(images), 3, *size)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = (image - MEAN) / STD
    return batch


def by_kernel(images: list[Tensor], size: tuple[int, int], channels_last: bool) -> Tensor:
    module = pytest.importorskip("gn_detect.ops.normalize_triton", exc_type=ImportError)
    order = torch.channels_last if channels_last else torch.contiguous_format
    output = torch.full((len(images), 3, *size), torch.nan, device=DEVICE).contiguous(memory_format=order)
    constants = MEAN.to(DEVICE), STD.to(DEVICE)
    module.normalize_images(*pack(images), *constants, output, channels_last)
    return output.cpu()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("sizes", "size"), CASES)
def test_kernel_and_operator_are_equal_to_the_bit(
    sizes: list[tuple[int, int]], size: tuple[int, int], channels_last: bool
) -> None:
    images = make_images(sizes)
    wanted = expected(images, size).view(torch.int32)
    assert torch.equal(by_kernel(images, size, channels_last).view(torch.int32), wanted)
    found = normalize_images(*pack(images), MEAN.to(DEVICE), STD.to(DEVICE), size, channels_last)
    assert torch.equal(found.cpu().view(torch.int32), wanted)
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=order)


def test_no_images() -> None:
    assert by_kernel([], (32, 32), False).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_gpu_with_and_without_triton(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("gn_detect.ops.normalize_triton", exc_type=ImportError)
    calls: list[tuple] = []
    monkeypatch.setattr(module, "normalize_images", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(normalize, "kernels_run_on", lambda device: kernels)
    images = make_images([(4, 5)])
    found = normalize._on_gpu(*pack(images), MEAN.to(DEVICE), STD.to(DEVICE), 8, 8, False)
    assert len(calls) == kernels
    assert kernels or torch.equal(found.cpu(), expected(images, (8, 8)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operator_is_well_formed(channels_last: bool) -> None:
    arguments = *pack(make_images([(4, 5), (8, 3)])), MEAN.to(DEVICE), STD.to(DEVICE), 8, 32, channels_last
    torch.library.opcheck(torch.ops.gn_detect.normalize_images.default, arguments)
