"""The eps and groups of each norm in a checkpoint: written, heeded in loading, refused if broken."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from gn_detect import build_model, convert_norm, load_config, load_weights
from gn_detect.layers import make_norm
from gn_detect.weights import (
    CheckpointMetadata,
    group_keys,
    norm_metadata,
    norm_settings,
    read_checkpoint,
    save_weights,
)
from tests.refusal import refusal


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))


@pytest.mark.parametrize("ending", [".pth", ".pkl", ".safetensors"])
def test_from_one_model_to_another(tmp_path, ending: str) -> None:
    source, target, path = model(), model(), tmp_path / f"gn{ending}"
    source[1].eps, source[3].eps = 0.3, 1.7
    save_weights(path, source.state_dict(), norm_settings(source))
    report = load_weights(target, path)
    assert (target[1].eps, target[3].eps) == (0.3, 1.7)
    assert "2 norms have the file's eps: '1', '3'" in str(report)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(source(x), target(x))
    assert "eps" not in str(load_weights(target, path))


def test_names_of_another_library(tmp_path) -> None:
    """A converted ResNet of torchvision becomes a detector's backbone, and its other norms keep theirs."""
    torch.manual_seed(0)
    classifier, _ = convert_norm(torchvision.models.resnet18(), init="reset", eps=0.3)
    path = tmp_path / "resnet18.pth"
    save_weights(path, classifier.state_dict(), norm_settings(classifier))
    keys = ["MODEL.GN.MIN_CHANNELS_PER_GROUP", "16", "INPUT.FORMAT", "RGB"]
    detector = build_model(load_config("configs/quick/nuclei_r18_gn.yaml", keys))
    load_weights(detector, path, for_training=True)
    eps = {n: m.eps for n, m in detector.named_modules() if isinstance(m, nn.GroupNorm)}
    assert {value for name, value in eps.items() if name.startswith("backbone.bottom_up.")} == {0.3}
    assert {value for name, value in eps.items() if not name.startswith("backbone.bottom_up.")} == {1e-5}


def test_names_of_a_wrapped_model(tmp_path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    source, target, path = model(), model(), tmp_path / "gn.pth"
    source[1].eps, source[3].eps = 1, 0.3  # a whole number, as a user may give it
    wrapped = Wrapper(source)
    save_weights(path, wrapped.state_dict(), norm_settings(wrapped))
    load_weights(target, path)
    assert (target[1].eps, target[3].eps) == (1.0, 0.3)


class Classifier(nn.Module):
    """Its norms are all in ``model``, its tensors are not."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = model(), nn.Linear(4, 2)


class Outer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda net: net, Outer, lambda net: Outer(Outer(net))])
def test_names_that_are_no_wrapper_stay(tmp_path, wrap) -> None:
    source, target, path = Classifier(), Classifier(), tmp_path / "gn.pth"
    source.model[1].eps = 0.3
    wrapped = wrap(source)
    save_weights(path, wrapped.state_dict(), norm_settings(wrapped))
    assert read_checkpoint(path).metadata.group_norm_groups == {"model.1": 2, "model.3": 1}
    load_weights(target, path)
    assert target.model[1].eps == 0.3
    target.model[1].num_groups = 4
    with refusal("other-groups", "2 groups in 'model.1'", "the model 4"):
        load_weights(target, path)


def test_a_wrapped_norm_alone() -> None:
    assert norm_settings(Outer(nn.GroupNorm(2, 4, eps=0.1))) == norm_metadata({"": 0.1}, {"": 2})
    assert norm_settings(nn.GroupNorm(2, 4)) == CheckpointMetadata(group_norm_groups={"": 2})
    bare = Outer(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(2, 4, affine=False)))
    assert norm_settings(bare).to_dict() == {"group_norm_groups": {"1": 2}}


@pytest.mark.parametrize("key", ["group_norm_eps", "group_norm_groups"])
def test_names_that_nothing_has_are_refused(tmp_path, key: str) -> None:
    """Names that were written by hand, or by an older version for such a net."""
    source, target, path = Classifier(), Classifier(), tmp_path / "gn.pth"
    save_weights(path, source.state_dict(), {key: {"1": 2, "3": 2}})
    with refusal("damaged-record", "'1'", "'model.1'"):
        load_weights(target, path)


def test_names_of_a_head_that_was_taken_out_of_the_file(tmp_path) -> None:
    source, target, path = model(), model(), tmp_path / "gn.pth"
    source[1].eps = 0.3
    settings = norm_settings(source)
    settings.group_norm_groups["mask_head.norm"] = 32
    save_weights(path, source.state_dict(), settings)
    load_weights(target, path)
    assert target[1].eps == 0.3


def test_the_usual_eps_comes_back(tmp_path) -> None:
    """A model takes the eps of the last file, as of the first; a config's is of models without a file."""
    relative, usual, target = model(), model(), model()
    relative[1].eps = relative[3].eps = 0.5
    for name, source in (("relative", relative), ("usual", usual)):
        save_weights(tmp_path / f"{name}.pth", source.state_dict(), norm_settings(source))
    load_weights(target, tmp_path / "relative.pth")
    report = load_weights(target, tmp_path / "usual.pth")
    assert (target[1].eps, target[3].eps) == (1e-5, 1e-5)
    assert "2 norms have the file's eps: '1', '3'" in str(report)


def test_a_file_that_tells_nothing_changes_no_eps(tmp_path) -> None:
    """detectron2's, for example: then MODEL.GN.EPS holds."""
    target = model()
    target[1].eps = 1e-3
    torch.save({"model": model().state_dict()}, tmp_path / "theirs.pth")
    load_weights(target, tmp_path / "theirs.pth")
    assert target[1].eps == 1e-3


def test_an_eps_of_the_config_is_written_and_comes_back(tmp_path) -> None:
    keys = ["MODEL.GN.MIN_CHANNELS_PER_GROUP", "16", "MODEL.GN.EPS", "0.001"]
    trained = build_model(load_config("configs/quick/nuclei_r18_gn.yaml", keys))
    save_weights(tmp_path / "trained.pth", trained.state_dict(), norm_settings(trained))
    plain = build_model(load_config("configs/quick/nuclei_r18_gn.yaml", keys[:2]))
    load_weights(plain, tmp_path / "trained.pth")
    assert {m.eps for m in plain.modules() if isinstance(m, nn.GroupNorm)} == {1e-3}


def test_the_usual_eps_is_not_written() -> None:
    assert norm_settings(model()).to_dict() == {"group_norm_groups": {"1": 2, "3": 1}}


def test_norms_of_layers_that_start_afresh_keep_theirs(tmp_path) -> None:
    source, target, path = model(), model(), tmp_path / "gn.pth"
    source[1].eps = source[3].eps = 0.3
    tensors = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("3.")}
    save_weights(path, tensors, norm_settings(source))
    load_weights(target, path, for_training=True)
    assert (target[1].eps, target[3].eps) == (0.3, 1e-5)


@pytest.mark.parametrize("eps", [{"1": -0.1}, {"1": float("inf")}, {"1": True}, {"1": "0.3"}, [0.3], 0.3])
def test_what_is_no_eps_is_refused_and_changes_nothing(tmp_path, eps: object) -> None:
    source, target, path = model(), model(), tmp_path / "gn.pth"
    with torch.no_grad():
        source[0].weight.add_(1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    save_weights(path, source.state_dict(), {"group_norm_eps": eps})
    with refusal("damaged-record", "'group_norm_eps'"):
        load_weights(target, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert target[1].eps == 1e-5


@pytest.mark.parametrize("ending", [".pth", ".pkl", ".safetensors"])
def test_a_model_of_other_groups_is_refused(tmp_path, ending: str) -> None:
    """The tensors have the same shapes, so it would load, and compute something else."""
    torch.manual_seed(0)
    original = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.Conv2d(64, 96, 1), nn.BatchNorm2d(96)
    )
    source, _ = convert_norm(original, num_groups=8, min_channels_per_group=16)
    path = tmp_path / f"gn{ending}"
    save_weights(path, source.state_dict(), norm_settings(source))
    target, _ = convert_norm(original, num_groups=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    keys = "MODEL.GN.NUM_GROUPS 6 MODEL.GN.MIN_CHANNELS_PER_GROUP 16"
    with refusal("other-groups", "4 groups in '1'", "the model 1", keys, "--num-groups 6"):
        load_weights(target, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    again, _ = convert_norm(original, num_groups=6, min_channels_per_group=16)
    load_weights(again, path)


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        ({(64, 32), (256, 32)}, (32, 1)),
        ({(64, 4), (96, 6), (256, 16), (1024, 32)}, (32, 16)),
        ({(64, 1), (128, 1)}, (1, 1)),
        ({(64, 64), (128, 128)}, None),
        ({(64, 4), (64, 32)}, None),
    ],
)
def test_keys_that_give_groups(layers: set[tuple[int, int]], keys: tuple[int, int] | None) -> None:
    assert group_keys(layers) == keys
    if keys is not None:
        for channels, groups in layers:
            norm = make_norm("GN", channels, keys[0], min_channels_per_group=keys[1])
            assert norm.num_groups == groups


def test_groups_that_no_setting_gives(tmp_path) -> None:
    source, target, path = model(), model(), tmp_path / "gn.pth"
    target[1].num_groups = 4
    save_weights(path, source.state_dict(), norm_settings(source))
    with refusal("other-groups", "2 groups in '1'", "the model 4"):
        load_weights(target, path)
    save_weights(path, source.state_dict(), {"group_norm_groups": {"1": 0}})
    with refusal("damaged-record", "'group_norm_groups'"):
        load_weights(target, path)
