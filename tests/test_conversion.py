"""``convert_checkpoint``: the work of the commands ``convert`` and ``calibrate``, as a function."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

import gn_detect
from gn_detect import UserError
from gn_detect.cli import convert
from gn_detect.cli.main import parse
from gn_detect.conversion import CheckpointReport, _prepare_images
from gn_detect.interop.library_models import LibraryModel
from gn_detect.weights import SUFFIXES, read_checkpoint


@pytest.fixture
def source(tmp_path):
    """A checkpoint of somebody's own model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32))
    model.train()(torch.randn(4, 3, 8, 8))
    torch.save(model.state_dict(), tmp_path / "bn.pth")
    return tmp_path / "bn.pth"


def test_the_report_tells_the_norms_and_how_to_load_the_file(source, tmp_path) -> None:
    target = tmp_path / "gn.pth"
    report = gn_detect.convert_checkpoint(source, target, eps=1e-4, num_groups=1)
    assert isinstance(report, CheckpointReport)
    assert report.weights == str(target)
    assert [(layer.name, layer.groups, layer.eps) for layer in report.layers] == [("1", 1, 1e-4)]
    lines = str(report).splitlines()
    assert lines[1].split() == ["1", "BatchNorm2d", "32", "1", "0.0001", "match", "yes"]
    assert lines[-1] == f"wrote {target}; {report.usage}"
    assert "num_groups=1" in report.usage
    assert set(report.to_dict()) == {
        "layers", "parameters_before", "parameters_after", "similarity", "warnings", "steps", "weights"
    }  # fmt: skip
    found = read_checkpoint(target)
    assert list(found.tensors) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert found.metadata.group_norm_eps == {"1": 1e-4}


def test_a_librarys_model_is_calibrated_further(tmp_path, monkeypatch) -> None:
    """Also with paths and a report; the eps of the earlier conversion stays."""
    monkeypatch.setattr("gn_detect.convert.balance.STEPS", 2)
    monkeypatch.setattr("gn_detect.conversion.WINDOWS", 2)
    torch.manual_seed(0)
    weights, images = tmp_path / "bn.pth", tmp_path / "images"
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), weights)
    images.mkdir()
    for i in range(2):
        Image.effect_noise((64, 64), 60).save(images / f"{i}.png")
    first, second = tmp_path / "gn.pth", tmp_path / "better.pth"
    gn_detect.convert_checkpoint("mobilenet_v3_small", first, weights=weights)
    with pytest.raises(UserError, match="has its own eps; leave --eps and --relative-eps out"):
        gn_detect.convert_checkpoint(
            "mobilenet_v3_small", second, images, weights=weights, converted=first, relative_eps=1.0
        )
    report = gn_detect.convert_checkpoint(
        "mobilenet_v3_small",
        second,
        images,
        weights=weights,
        converted=first,
        steps=0,
        report_file=tmp_path / "report.json",
    )
    assert "converted" in report.similarity
    assert (tmp_path / "report.png").exists()
    assert set(read_checkpoint(second).metadata.group_norm_eps.values()) == {1e-3}
    kept = tmp_path / "kept.pth"
    settings = {"weights": weights, "converted": first, "steps": 0}
    gn_detect.convert_checkpoint("mobilenet_v3_small", kept, images, rescale=False, **settings)
    start, rescaled, same = (read_checkpoint(path).tensors for path in (first, second, kept))
    convolution = "features.1.block.0.0.weight"
    assert not torch.equal(rescaled[convolution], start[convolution])
    assert torch.equal(same[convolution], start[convolution])


def test_a_photo_gives_itself_and_windows(tmp_path, monkeypatch) -> None:
    """Windows of one photo are together, all of one size, and the same in each call."""
    for i in range(2):
        Image.effect_noise((80, 50), 60).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    model = LibraryModel(nn.Identity(), lambda picture: to_tensor(picture.resize((16, 16))))
    monkeypatch.setattr(gn_detect.conversion, "WINDOWS", 3)
    inputs = _prepare_images(model, "a model", tmp_path, paths)
    assert inputs.shape == (6, 3, 16, 16)
    for i, path in enumerate(paths):
        assert torch.equal(inputs[3 * i], model.prepare(Image.open(path).convert("RGB")))
    assert len(inputs.flatten(1).unique(dim=0)) == 6
    assert torch.equal(inputs, _prepare_images(model, "a model", tmp_path, paths))
    monkeypatch.setattr(gn_detect.conversion, "WINDOWS_BYTES", 4 * inputs[0].nbytes)
    assert len(_prepare_images(model, "a model", tmp_path, paths)) == 4


def test_the_commands_have_the_functions_arguments_and_defaults() -> None:
    parameters = inspect.signature(gn_detect.convert_checkpoint).parameters
    found = vars(parse(["convert", "a.pth", "b.pth"]))
    own = {"source", "target", "images", "eps", "relative_eps", *convert.SHARED}
    assert own | {"config", "converted"} == set(parameters)
    for name in own - {"source", "target", "overrides"}:
        assert found[name] == parameters[name].default, name
    others = vars(parse(["calibrate", "a.pth", "b.pth", "c.pth", "--images", "photos"]))
    assert all(others[name] == found[name] for name in convert.SHARED)
    assert tuple(f".{name}" for name in convert.FORMATS) == SUFFIXES
