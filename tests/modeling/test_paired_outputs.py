"""Two detectors are compared on the proposals of one."""

from __future__ import annotations

import pytest
import torch

from gn_detect import calibrate, convert_norm
from gn_detect.modeling import paired_outputs

BATCH_NORM = {f"MODEL.{part}.NORM": "BN" for part in ("RESNETS", "FPN", "ROI_MASK_HEAD")}


@pytest.fixture
def detector(small_model):
    model = small_model(BATCH_NORM)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def test_pairs_of_one_model_are_equal_and_of_the_documented_shapes(detector) -> None:
    images = [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)]
    pairs = paired_outputs(detector, detector, images)
    for expected, found in pairs:
        torch.testing.assert_close(expected, found, rtol=0, atol=0)
        assert found.requires_grad
        assert not expected.requires_grad
    shapes = [tuple(expected.shape) for expected, _ in pairs]
    assert shapes[0] == (1, 32, 24, 32)
    assert shapes[5][:2] == (1, 1)
    assert shapes[10][:2] == (1, 4)
    regions = shapes[-2][0]
    assert shapes[-3:] == [(regions, 4), (regions, 12), (min(regions, 32), 1, 28, 28)]
    assert 32 < regions <= 128


def test_every_convolution_of_a_detector_is_rescaled(detector, monkeypatch) -> None:
    """Pairs of outputs run a model twice; a layer that is called twice is usually a shared one."""
    monkeypatch.setattr("gn_detect.convert.balance.STEPS", 5)
    norms = [name for name, m in detector.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for name in norms:  # statistics as the images give
        detector.get_submodule(name).train().momentum = None
    batches = [[torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)] for _ in range(6)]
    with torch.no_grad():
        for batch in batches:
            paired_outputs(detector, detector, batch)
    model, report = convert_norm(detector.eval())
    calibrate(detector, model, batches, 0, outputs=paired_outputs, report=report, progress=False)
    assert not report.warnings
    assert "balanced" in report.similarity
    for name in norms:
        layer = name.removesuffix(".norm")
        before, after = (m.get_submodule(layer).weight for m in (detector, model))
        assert not torch.equal(before, after), layer


@pytest.mark.slow
def test_a_detector_is_calibrated_on_images_of_several_sizes(detector) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        [torch.randint(0, 256, (3, size, 96), dtype=torch.uint8, generator=generator)]
        for size in (64, 96, 64, 96)
    ]
    model, report = convert_norm(detector)
    calibrate(
        detector, model, batches, 4, learning_rate=1e-3, outputs=paired_outputs, report=report, progress=False
    )
    assert report.similarity["calibrated"] > report.similarity["converted"]
    assert all(layer.errors["calibrated"] < 2 for layer in report.layers)
