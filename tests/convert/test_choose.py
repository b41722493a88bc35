"""``choose_settings``: the groups and the relative eps with which the outputs are closest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_detect.convert import choose_settings, convert_norm
from gn_detect.convert.choose import CANDIDATES, ENOUGH, choose_steps


def network(images: Tensor, channels: int = 32) -> nn.Module:
    """Build a network with the statistics of the images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels, momentum=None), nn.ReLU(),
        nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels, momentum=None), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5),
    )  # fmt: skip
    model.train()(images)
    return model.eval()


@pytest.fixture
def photos() -> Tensor:
    """Images of very different contrast."""
    generator = torch.Generator().manual_seed(0)
    contrast = torch.tensor([0.05, 0.3, 1.0, 4.0]).repeat(10).view(-1, 1, 1, 1)
    return torch.randn(40, 3, 12, 12, generator=generator) * contrast


def cosine(original: nn.Module, images: Tensor, **settings: float) -> float:
    converted, _ = convert_norm(original, **settings)
    with torch.no_grad():
        return F.cosine_similarity(original(images), converted(images)).mean().item()


def test_the_closest_is_chosen(photos: Tensor) -> None:
    original = network(photos)
    choice = choose_settings(original, photos)
    found = [cosine(original, photos[::2], **settings) for settings in CANDIDATES]
    assert max(found) < ENOUGH
    assert choice.settings == CANDIDATES[found.index(max(found))]
    assert [similarity for _, similarity in choice.similarity] == pytest.approx(found, abs=1e-5)
    assert f"relative-eps {choice.settings['relative_eps']:g}" in str(choice)


def test_the_papers_norm_is_kept_where_it_suffices(photos: Tensor) -> None:
    """Images of one contrast have the statistics that BatchNorm's predict."""
    alike = photos[2::4]
    choice = choose_settings(network(alike), alike)
    assert choice.settings == CANDIDATES[0]
    assert len(choice.similarity) == 1


def test_what_is_given_stays(photos: Tensor) -> None:
    original = network(photos)
    choice = choose_settings(original, list(photos.split(8)), {"relative_eps": 0.0, "num_groups": 2})
    assert choice.settings["relative_eps"] == 0
    assert choice.settings["num_groups"] == 2
    assert len(choice.similarity) == 2  # groups of at least 16 channels and of any number


def test_steps_follow_from_norms_and_images() -> None:
    assert choose_steps(norms=50, batches=1000.0) == 1500
    assert choose_steps(norms=50, batches=100.5) == 804
    assert choose_steps(norms=50, batches=1.0) == choose_steps(norms=1, batches=1000.0) == 100
