"""One model of each of torchvision's families: converts, counts, trains on one image, compiles."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from gn_detect.convert import convert_norm

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BOXES = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]


def total(value: object) -> Tensor:
    """Sum of all tensors in the output."""
    if isinstance(value, Tensor):
        return value.sum()
    items = value.values() if isinstance(value, dict) else value
    return torch.stack([total(item) for item in items]).sum()


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "vgg11_bn", "lraspp_mobilenet_v3_large",
     "fasterrcnn_mobilenet_v3_large_320_fpn",
     *(pytest.param(name, marks=pytest.mark.slow) for name in (
         "densenet121", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "regnet_x_400mf"))],
)  # fmt: skip
def test_family(name: str) -> None:
    torch.manual_seed(0)
    options = {"weights_backbone": None} if name.startswith(("lraspp", "fasterrcnn")) else {}
    options |= {"init_weights": False} if name == "vgg11_bn" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    if name == "vgg11_bn":  # its classifier has 93% of the parameters, and no norm
        model.classifier = nn.Linear(25088, 3)
    buffers = sum(
        2 * module.weight.numel()
        for module in model.modules()
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d)
    )
    before = sum(parameter.numel() for parameter in model.parameters())
    new, report = convert_norm(model)
    assert report.parameters_before == before
    assert report.parameters_after == before + buffers
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in new.modules())
    new.train()
    output = new(list(IMAGE), BOXES) if name.startswith("fasterrcnn") else new(IMAGE)
    total(output).backward()
    norms = [module for module in new.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == len(report.layers)
    reached = sum(norm.weight.grad is not None for norm in norms)
    assert reached >= len(norms) - 2  # an auxiliary branch may be left out


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    model, _ = convert_norm(resnet.eval())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGE), model(IMAGE))
    compiled(IMAGE).sum().backward()
    assert model.bn1.weight.grad is not None
