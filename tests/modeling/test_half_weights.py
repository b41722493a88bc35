"""Weights that are rounded at once give the losses and gradients of autocast, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from gn_detect.layers import Conv2d, GroupNorm
from gn_detect.modeling import MaskRCNN
from gn_detect.modeling.half_weights import half_weights
from tests.modeling.test_static import SIZES, make_target

BF16 = torch.bfloat16


class Layers(nn.Module):
    """One layer of each kind, of which one is frozen, one runs twice, one never, and one is read outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Conv2d(3, 8, 3).requires_grad_(False)
        self.twice = Conv2d(8, 8, 3, padding=1, norm=GroupNorm(2, 8), activation="relu")
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.unused = nn.Linear(3, 3)
        self.linear = nn.Linear(4, 5)
        self.gathered = nn.Linear(5, 6)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen += [self.frozen.weight.dtype, self.up.bias.dtype, self.gathered.weight.dtype]
        x = self.up(self.twice(self.twice(self.frozen(x))))
        x = self.linear(x.mean(dim=(2, 3)))
        return (x @ self.gathered.weight[[0, 0, 3]].t()).float().square().sum()


def test_gradients_of_every_kind_of_layer() -> None:
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    found = []
    for rounded in (False, True):
        model = Layers()
        block = half_weights(model, BF16, without=model.gathered) if rounded else nullcontext()
        with torch.autocast("cpu", dtype=BF16), block:
            loss = model(x)
        loss.backward()
        assert model.seen == [BF16 if rounded else torch.float32] * 2 + [torch.float32]
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (ours, our_gradients) = found
    assert torch.equal(ours, loss)
    torch.testing.assert_close(our_gradients, gradients, rtol=0, atol=0)
    missing = {name for name, gradient in our_gradients.items() if gradient is None}
    assert missing == {f"{n}.{kind}" for n in ("frozen", "unused") for kind in ("weight", "bias")} | {
        "gathered.bias"
    }


def test_weights_return_after_an_error() -> None:
    model = Layers()
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError), half_weights(model, BF16):
        model(torch.randn(1, 2, 9, 9))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize("conv", ["", "WS"])
def test_a_model_has_the_losses_and_gradients_of_autocast(
    conv: str, small_model: Callable[..., MaskRCNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are standardised before they are rounded."""
    keys = {"MODEL.RESNETS.CONV": conv, "MODEL.ROI_MASK_HEAD.CONV": conv}
    model = small_model({"MODEL.BACKBONE.FREEZE_AT": 2} | keys).train()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in SIZES]
    inputs = model.prepare(images, [make_target(3, size, n) for n, size in enumerate(SIZES)])
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=BF16):
            losses = model.static_losses(inputs)
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append(({name: loss.detach() for name, loss in losses.items()}, gradients))
        monkeypatch.setattr(MaskRCNN, "_half_weights", lambda self: nullcontext())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert sum(gradient is not None for gradient in found[0][1].values()) > 50
