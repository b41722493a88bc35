"""``gn-detect convert``: a detector's checkpoint, with and without images."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from PIL import Image

import gn_detect
from gn_detect import UserError
from gn_detect.cli import main
from gn_detect.config import dump_config
from gn_detect.convert import convert_state_dict
from gn_detect.interop.library_models import load_library_model
from gn_detect.weights import norm_metadata, norm_settings, read_architecture, read_checkpoint, save_weights
from tests.weights.schemes import mmdetection
from tests.weights.test_mmdetection_config import FLAT, write

NORMS = [f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
CONFIG = "configs/quick/nuclei_r18_gn.yaml"
SMALL = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.DEVICE", "cpu"]
SMALL += ["MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
SMALL += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.RPN.POST_NMS_TOPK_TEST", "16"]
BATCH_NORM = [word for key in NORMS for word in (key, "BN")] + SMALL


@pytest.fixture(scope="module")
def torchvision_detector(tmp_path_factory):
    """The untrained weights of torchvision's first Faster R-CNN; tests must not write to them."""
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    path = tmp_path_factory.mktemp("torchvision") / "detector.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def rough_scales(monkeypatch) -> None:
    """Spend little time on a calibration's scales; tests/convert checks what they are good for."""
    monkeypatch.setattr("gn_detect.convert.balance.STEPS", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small detector with BatchNorm; tests must not write to it."""
    torch.manual_seed(0)
    model = gn_detect.build_model(gn_detect.load_config(CONFIG, BATCH_NORM))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("detector") / "bn.pth"
    save_weights(path, model.state_dict(), {"class_names": ["nucleus"], "category_ids": [1], "iteration": 9})
    return path


def loads(path) -> bool:
    cfg = gn_detect.load_config(CONFIG, [*SMALL, "MODEL.GN.MIN_CHANNELS_PER_GROUP", "16"])
    gn_detect.load_weights(gn_detect.build_model(cfg), path)
    return True


def test_without_data(checkpoint, tmp_path, capsys) -> None:
    target, report = tmp_path / "gn.pth", tmp_path / "report.json"
    assert main(["convert", str(checkpoint), str(target), "--report", str(report)]) == 0
    assert loads(target)
    metadata = read_checkpoint(target).metadata
    groups = metadata.group_norm_groups
    assert metadata.to_dict().keys() == {"class_names", "category_ids", "group_norm_groups"}
    assert metadata.class_names == ["nucleus"]
    assert metadata.category_ids == [1]
    assert len(groups) == 37
    assert groups["backbone.bottom_up.res5.1.conv2.norm"] == 8
    assert "MODEL.GN.MIN_CHANNELS_PER_GROUP 16" in capsys.readouterr().out
    assert len(json.loads(report.read_text())["layers"]) == 37


@pytest.mark.parametrize("words", [["--config-file", CONFIG, *BATCH_NORM], []])
def test_a_converted_file_holds_the_config_of_its_model(words, checkpoint, tmp_path) -> None:
    target = tmp_path / "gn.pth"
    if not words:  # the source holds its config
        cfg = gn_detect.load_config(CONFIG, [*BATCH_NORM, "MODEL.WEIGHTS", str(tmp_path / "first.pth")])
        save_weights(checkpoint, read_checkpoint(checkpoint).tensors, {"config": dump_config(cfg)})
    assert main(["convert", str(checkpoint), str(target), *words]) == 0
    text = read_checkpoint(target).metadata.config
    assert text is not None
    assert str(tmp_path) not in text
    (tmp_path / "config.yaml").write_text(text)
    cfg = gn_detect.load_config(tmp_path / "config.yaml")
    assert cfg.model.resnets.norm == cfg.model.roi_mask_head.norm == "GN"
    assert cfg.model.gn.min_channels_per_group == 16
    gn_detect.load_weights(gn_detect.build_model(cfg), target, config=cfg)


def test_the_eps_that_a_checkpoint_was_trained_with_is_told(checkpoint, tmp_path) -> None:
    target = tmp_path / "gn.pth"
    assert main(["convert", str(checkpoint), str(target), "--eps", "0.001"]) == 0
    eps = read_checkpoint(target).metadata.group_norm_eps
    assert len(eps) == 37
    assert set(eps.values()) == {1e-3}
    assert loads(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        Image.effect_noise((96, 80 + 16 * i), 60).save(folder / f"{i}.png")
    return folder


class OwnModel(torch.nn.Module):
    """A model of anybody's, with norms of its own and a counter that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32))
        self.plain = torch.nn.BatchNorm2d(32, affine=False)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(self.stem(x))


def resnet10() -> torch.nn.Module:
    """The smallest ResNet with torchvision's names."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


class Within(torch.nn.Module):
    """Holds a model under a name, as wrappers do: ``module.``, ``model._orig_mod.``, ..."""

    def __init__(self, prefix: str, inner: torch.nn.Module) -> None:
        super().__init__()
        name, _, rest = prefix.partition(".")
        self.add_module(name, Within(rest, inner) if rest else inner)


PREFIXES = ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "model.model.", "backbone.", "net."]


@pytest.mark.parametrize(
    ("make", "prefix"),
    [*((OwnModel, prefix) for prefix in PREFIXES), (resnet10, "module."), (resnet10, "net.")],
)
def test_anothers_state_dict_loads_into_its_own_model(make, prefix, tmp_path, capsys) -> None:
    torch.manual_seed(0)
    model = Within(prefix, make()) if prefix else make()
    source, target = tmp_path / "bn.pth", tmp_path / "gn.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, source)
    assert main(["convert", str(source), str(target), "--eps", "0.002"]) == 0
    reported = capsys.readouterr().out
    assert "gn_detect.convert_norm(model, init='reset'" in reported
    assert ("MODEL.WEIGHTS" in reported) == (make is not OwnModel and prefix != "net.")
    content = torch.load(target, weights_only=True)
    model.eval()
    expected, _ = gn_detect.convert_norm(model, eps=0.002)
    own, _ = gn_detect.convert_norm(model, init="reset", eps=content["group_norm_eps"])
    assert list(content["model"]) == list(own.state_dict())
    own.load_state_dict(content["model"], strict=True)
    again, _ = gn_detect.convert_norm(model, init="reset", eps=1.0)
    gn_detect.load_weights(again, target)
    eps = {name: m.eps for name, m in again.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert eps == content["group_norm_eps"]
    assert set(eps.values()) == {0.002}
    for name, tensor in expected.state_dict().items():  # the statistics are 0 and 1: of BatchNorm's own eps
        assert torch.allclose(own.state_dict()[name], tensor, rtol=2e-3)
        assert torch.equal(again.state_dict()[name], own.state_dict()[name])


def test_an_averaged_model_takes_its_file_back(tmp_path) -> None:
    """Its counter is neither a weight nor under the wrapper's name."""
    model = torch.optim.swa_utils.AveragedModel(OwnModel())
    torch.save(model.state_dict(), tmp_path / "bn.pth")
    assert main(["convert", str(tmp_path / "bn.pth"), str(tmp_path / "gn.pth")]) == 0
    own, _ = gn_detect.convert_norm(model, init="reset")
    own.load_state_dict(torch.load(tmp_path / "gn.pth", weights_only=True)["model"], strict=True)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.module."])
def test_a_detectors_names_lose_their_wrapper(prefix, checkpoint, tmp_path, capsys) -> None:
    tensors = {prefix + name: tensor for name, tensor in read_checkpoint(checkpoint).tensors.items()}
    torch.save(tensors, tmp_path / "bn.pth")
    assert main(["convert", str(tmp_path / "bn.pth"), str(tmp_path / "gn.pth")]) == 0
    reported = capsys.readouterr().out
    assert "MODEL.WEIGHTS" in reported
    assert "convert_norm" not in reported
    assert "--eps" not in reported
    content = torch.load(tmp_path / "gn.pth", weights_only=True)
    assert all(name.startswith(("backbone.", "proposal", "roi_heads.")) for name in content["model"])
    assert loads(tmp_path / "gn.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_another_format_alone_keeps_anothers_names(prefix, tmp_path, capsys) -> None:
    state = {prefix + name: tensor for name, tensor in OwnModel().state_dict().items()}
    torch.save(state, tmp_path / "bn.pth")
    assert main(["convert", "--keep-norm", str(tmp_path / "bn.pth"), str(tmp_path / "bn.pt")]) == 0
    assert "names as they were" in capsys.readouterr().out
    found = torch.load(tmp_path / "bn.pt", weights_only=True)["model"]
    assert list(found) == list(state)


def test_the_eps_of_a_library_is_taken_and_another_is_asked_for(tmp_path, capsys) -> None:
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "known.pth")
    torch.save(OwnModel().state_dict(), tmp_path / "own.pth")
    assert main(["convert", str(tmp_path / "known.pth"), str(tmp_path / "gn.pth")]) == 0
    assert "--eps" not in capsys.readouterr().out
    assert set(read_checkpoint(tmp_path / "gn.pth").metadata.group_norm_eps.values()) == {1e-3}
    assert main(["convert", str(tmp_path / "own.pth"), str(tmp_path / "gn.pth")]) == 0
    reported = capsys.readouterr().out
    assert (
        "warning: the eps of 2 BatchNorms, such as 'stem.1', does not follow from the names: 1e-05"
        in reported
    )
    assert "convert with --eps 0.001" in reported
    assert main(["convert", str(tmp_path / "own.pth"), str(tmp_path / "gn.pth"), "--eps", "1e-5"]) == 0
    assert "--eps" not in capsys.readouterr().out


@pytest.mark.slow
def test_relative_eps_of_a_detector(checkpoint, folder, tmp_path, capsys) -> None:
    """Every norm has its own, in the report, in the file, after calibrating, and in another format."""
    target, report, better = tmp_path / "gn.pth", tmp_path / "report.json", tmp_path / "better.pth"
    words = ["--config-file", CONFIG, *BATCH_NORM, "INPUT.MIN_SIZE_TEST", "64"]
    part = ["--relative-eps", "0.3", "--report", str(report)]
    assert main(["convert", str(checkpoint), str(target), *part, *words]) == 0
    reported = {layer["name"]: layer["eps"] for layer in json.loads(report.read_text())["layers"]}
    assert min(reported.values()) > 0.01
    assert len(set(reported.values())) > 30
    cfg = gn_detect.load_config(CONFIG, [*SMALL, "MODEL.GN.MIN_CHANNELS_PER_GROUP", "16"])
    model = gn_detect.build_model(cfg)
    gn_detect.load_weights(model, target)
    assert {n: m.eps for n, m in model.named_modules() if isinstance(m, torch.nn.GroupNorm)} == reported
    images = ["--images", str(folder), "--steps", "1", "--report", str(report)]
    assert main(["calibrate", str(checkpoint), str(target), str(better), *images, *words]) == 0
    assert {layer["name"]: layer["eps"] for layer in json.loads(report.read_text())["layers"]} == reported
    assert read_checkpoint(better).metadata.group_norm_eps == reported
    assert main(["convert", "--keep-norm", str(better), str(tmp_path / "gn.safetensors")]) == 0
    assert read_checkpoint(tmp_path / "gn.safetensors").metadata.group_norm_eps == reported
    capsys.readouterr()
    assert main(["convert", str(checkpoint), str(tmp_path / "no.pth"), *part]) == 2
    assert "--relative-eps needs the detector's --config-file" in capsys.readouterr().err
    assert main(["convert", "--keep-norm", str(checkpoint), str(tmp_path / "no.pth"), *part]) == 2
    assert "leave one out" in capsys.readouterr().err
    assert not (tmp_path / "no.pth").exists()


def test_errors_write_nothing(checkpoint, tmp_path, capsys) -> None:
    target = tmp_path / "gn.pth"
    assert main(["convert", str(checkpoint), str(target), "--images", str(tmp_path)]) == 2
    assert "--images needs the detector's --config-file" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(tmp_path / "gn.bin")]) == 2
    assert "must end in .pth" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(target)]) == 0
    again = tmp_path / "again.pth"
    assert main(["convert", str(target), str(again)]) == 2
    assert "no BatchNorm" in capsys.readouterr().err
    assert not again.exists()


def test_no_output_replaces_another_file(checkpoint, folder, tmp_path, capsys) -> None:
    before, target = checkpoint.read_bytes(), tmp_path / "gn.pth"

    def refused(*words: object) -> str:
        assert main(["convert", *map(str, words)]) == 2
        assert checkpoint.read_bytes() == before
        assert not target.is_file()
        return capsys.readouterr().err

    assert "[replaced-file]" in refused(checkpoint, checkpoint)
    assert "--report" in refused(checkpoint, target, "--report", target)
    images = ["--images", folder, "--config-file", CONFIG]
    assert "--checkpoint" in refused(checkpoint, target, *images, "--checkpoint", checkpoint)
    assert "[lone-flag]" in refused(checkpoint, target, "--checkpoint", checkpoint)
    assert "[lone-flag]" in refused(checkpoint, target, *images, "--steps", 0, "--checkpoint", checkpoint)
    weights = ["resnet18", checkpoint, "--weights", checkpoint]
    assert "[replaced-file]" in refused(*weights)
    json_of_images = tmp_path / "images.json"
    json_of_images.write_text("{}")
    assert "[replaced-file]" in refused(
        checkpoint, target, "--images", json_of_images, "--report", json_of_images
    )
    assert "[bad-argument]" in refused(checkpoint, target, "--num-groups", 0)
    assert main(["convert", str(checkpoint), str(target)]) == 0
    words = ["calibrate", str(checkpoint), str(target), str(target), "--images", str(folder)]
    assert main([*words, "--config-file", CONFIG]) == 2
    assert "[replaced-file]" in capsys.readouterr().err


def test_with_images_and_a_result_that_cannot_be_written_at_first(
    checkpoint, folder, tmp_path, capsys, monkeypatch
) -> None:
    """The calibration is not lost."""
    progress, target = tmp_path / "calibration.pt", tmp_path / "gn.safetensors"
    target.mkdir()
    report = tmp_path / "report.json"
    words = ["convert", str(checkpoint), str(target), "--images", str(folder), "--steps", "2"]
    words += ["--checkpoint", str(progress), "--report", str(report), "--config-file", CONFIG, *BATCH_NORM]
    words += ["INPUT.MIN_SIZE_TEST", "64"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "gn_detect.conversion.calibrate", lambda *_, **__: pytest.fail("calibrated before the check")
        )
        assert main(words) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not progress.exists()
    target.rmdir()

    def full(*_: object) -> None:
        raise UserError("cannot-write", "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("gn_detect.conversion.save_weights", full)
        assert main(words) == 2
    assert progress.exists()
    assert not target.exists()
    assert main(words) == 0
    assert loads(target)
    assert not progress.exists()
    assert set(json.loads(report.read_text())["similarity"]) >= {"converted", "calibrated"}
    assert Image.open(report.with_suffix(".png")).size == (1200, 540)


def test_the_groups_of_a_converted_file_are_kept(checkpoint, folder, tmp_path, capsys) -> None:
    one, better = tmp_path / "one.pth", tmp_path / "better.pth"
    assert main(["convert", str(checkpoint), str(one), "--num-groups", "1"]) == 0
    capsys.readouterr()
    words = ["calibrate", str(checkpoint), str(one), str(better), "--images", str(folder), "--steps", "0"]
    words += ["--config-file", CONFIG]
    keys = [*BATCH_NORM, "INPUT.MIN_SIZE_TEST", "64"]
    assert main([*words, "--num-groups", "8", *keys]) == 2
    assert "calibrate: --num-groups 1 --min-channels-per-group 1)" in capsys.readouterr().err
    assert main([*words, *keys]) == 0
    assert "MODEL.GN.NUM_GROUPS 1" in capsys.readouterr().out, "how to load it"
    assert set(read_checkpoint(better).metadata.group_norm_groups.values()) == {1}


def test_groups_that_no_config_gives_are_refused(tmp_path, capsys) -> None:
    """A BatchNorm backbone below GroupNorm heads of 8 channels a group."""
    keys = ["MODEL.RESNETS.NORM", "BN", *SMALL, "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]
    torch.manual_seed(0)
    model = gn_detect.build_model(gn_detect.load_config(CONFIG, keys))
    source, target = tmp_path / "mixed.pth", tmp_path / "gn.pth"
    save_weights(source, model.state_dict())
    words = ["convert", str(source), str(target), "--config-file", CONFIG]
    assert main([*words, *keys]) == 2
    assert "no MODEL.GN gives these" in capsys.readouterr().err
    assert not target.exists()
    assert main([*words, "--min-channels-per-group", "1", *keys]) == 0
    assert "MODEL.GN.MIN_CHANNELS_PER_GROUP 1" in capsys.readouterr().out
    gn_detect.load_weights(gn_detect.build_model(gn_detect.load_config(CONFIG, keys[2:])), target)


def test_a_detector_without_norms_is_told(tmp_path, capsys) -> None:
    keys = [word for key in NORMS for word in (key, "")] + SMALL
    model = gn_detect.build_model(gn_detect.load_config(CONFIG, keys))
    source, target = tmp_path / "plain.pth", tmp_path / "gn.pth"
    save_weights(source, model.state_dict())
    assert main(["convert", str(source), str(target), "--config-file", CONFIG, *keys]) == 0
    assert "there is no norm to convert" in capsys.readouterr().out


def test_what_has_no_other_name_is_told(tmp_path, capsys) -> None:
    source, target = tmp_path / "resnet18.pth", tmp_path / "renamed.pth"
    torch.save(torchvision.models.resnet18().state_dict(), source)
    assert main(["convert", "--keep-norm", str(source), str(target)]) == 0
    assert "left out, as detectron2 has no name for them: fc.weight, fc.bias" in capsys.readouterr().out


def test_library_models_are_built_as_their_weights_want(tmp_path, monkeypatch, torchvision_detector) -> None:
    torch.manual_seed(0)
    with_auxiliary = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights_backbone=None, aux_loss=True
    )
    torch.save(with_auxiliary.state_dict(), tmp_path / "deeplab.pth")
    found = load_library_model("deeplabv3_mobilenet_v3_large", str(tmp_path / "deeplab.pth"))
    assert list(found.model.state_dict()) == list(with_auxiliary.state_dict())

    googlenet = torchvision.models.googlenet(init_weights=False, aux_logits=False)
    torch.save(googlenet.state_dict(), tmp_path / "googlenet.pth")
    assert load_library_model("googlenet", str(tmp_path / "googlenet.pth")).model.transform_input

    state = torch.load(torchvision_detector, weights_only=True)
    monkeypatch.setattr("gn_detect.interop.library_models._download", lambda *_: state)
    published = load_library_model("fasterrcnn_resnet50_fpn", "COCO_V1").model
    assert {m.eps for m in published.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.0}


def test_images_of_a_coco_json(checkpoint, folder, tmp_path, capsys) -> None:
    annotations, target = tmp_path / "coco.json", tmp_path / "gn.pth"
    annotations.write_text(json.dumps({"images": [{"file_name": f"{i}.png"} for i in range(4)]}))
    words = ["convert", str(checkpoint), str(target), "--images", str(annotations), "--steps", "0"]
    words += ["--max-images", "3", "--config-file", CONFIG]
    keys = [*BATCH_NORM, "INPUT.MIN_SIZE_TEST", "64"]
    assert main(words + keys) == 2
    said = capsys.readouterr().err
    assert "3 of 3 images are missing" in said
    assert "--image-folder" in said
    assert not target.exists()
    assert main([*words, "--image-folder", str(folder), *keys]) == 0
    assert loads(target)
    annotations.write_text('{"annotations": []}')
    assert main(words + keys) == 2
    assert "it has no 'images'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", pytest.param("timm/lcnet_050", marks=pytest.mark.slow)]
)
def test_a_librarys_model(name, folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("gn_detect.convert.balance.STEPS", 5)
    monkeypatch.setattr("gn_detect.conversion.WINDOWS", 2)
    torch.manual_seed(0)
    if name == "mobilenet_v3_small":
        model = torchvision.models.mobilenet_v3_small()
    else:
        model = pytest.importorskip("timm").create_model("lcnet_050")
    weights, target = tmp_path / "bn.pth", tmp_path / "gn.pth"
    torch.save(model.state_dict(), weights)
    words = ["convert", name, str(target), "--weights", str(weights), "--images", str(folder)]
    words += ["--max-images", "2"]
    assert main([*words, "--steps", "1", "--batch-size", "2"]) == 0
    said = capsys.readouterr().out
    (choice,) = (line for line in said.splitlines() if line.startswith("chosen: "))
    groups, least, part = (word for word in choice.split()[1:7] if not word.startswith("--"))
    assert f"gn_detect.convert_norm(model, init='reset', num_groups={groups}, min_" in said
    found = read_checkpoint(target)
    rule = {"num_groups": int(groups), "min_channels_per_group": int(least)}
    converted, _ = gn_detect.convert_norm(model, relative_eps=float(part), **rule)
    assert found.metadata.group_norm_eps == norm_settings(converted).group_norm_eps
    assert found.metadata.group_norm_groups == norm_settings(converted).group_norm_groups
    converted.load_state_dict(found.tensors)
    assert main([*words, "--steps", "0", "--relative-eps", "0.3", "--num-groups", "4"]) == 0
    said = capsys.readouterr().out
    assert "chosen: --num-groups 4 --min-channels-per-group" in said
    assert "--relative-eps 0.3 (" in said


def test_relative_eps_of_a_librarys_model(folder, tmp_path, capsys) -> None:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small()
    model(torch.randn(4, 3, 64, 64))  # statistics, of which eps is a part
    model.eval()
    weights, target = tmp_path / "bn.pth", tmp_path / "gn.pth"
    torch.save(model.state_dict(), weights)
    words = ["convert", "mobilenet_v3_small", str(target), "--weights", str(weights)]
    words += ["--relative-eps", "0.3"]
    assert main(words) == 0
    assert "eps=its 'group_norm_eps')[0]" in capsys.readouterr().out
    found = read_checkpoint(target)
    loaded, _ = gn_detect.convert_norm(model, init="reset", eps=found.metadata.group_norm_eps)
    loaded.load_state_dict(found.tensors)
    converted, _ = gn_detect.convert_norm(model, relative_eps=0.3)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), converted(x))


def test_what_is_wrong_with_a_librarys_model(checkpoint, folder, tmp_path, capsys) -> None:
    target = str(tmp_path / "gn.pth")

    def refused(*words: str) -> str:
        assert main(["convert", *words]) == 2
        assert not (tmp_path / "gn.pth").exists()
        return capsys.readouterr().err

    assert "[no-weights]" in refused("resnet18", target)
    assert "IMAGENET1K_V1" in refused("resnet18", target, "--weights", "V9")
    assert "[other-network]" in refused("resnet18", target, "--weights", str(checkpoint))
    assert "[conflicting-flags]" in refused(str(checkpoint), target, "--weights", "DEFAULT")
    torch.save(torchvision.models.video.s3d().state_dict(), tmp_path / "video.pth")
    video = ["s3d", target, "--weights", str(tmp_path / "video.pth")]
    assert "[calibration-images]" in refused(*video, "--images", str(folder))
    assert main(["convert", *video]) == 0


def without_large_parts(detector) -> dict[str, torch.Tensor]:
    """Return most tensors of torchvision's detector, and few of its values."""
    large = ("backbone.body.layer2", "backbone.body.layer3", "backbone.body.layer4", "roi_heads.box_head")
    tensors = torch.load(detector, weights_only=True)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(large)}


def test_the_first_detectors_of_torchvision_have_eps_0(torchvision_detector, tmp_path) -> None:
    tensors = without_large_parts(torchvision_detector)
    for name, tensor in tensors.items():
        if name.endswith("running_var"):
            torch.nn.init.uniform_(tensor, 1e-6, 3e-5)
    torch.save(tensors, tmp_path / "v1.pth")
    found = {}
    for name, keys in {"alone": [], "zero": ["--eps", "0"], "usual": ["--eps", "1e-5"]}.items():
        assert main(["convert", str(tmp_path / "v1.pth"), str(tmp_path / "gn.pth"), *keys]) == 0
        found[name] = read_checkpoint(tmp_path / "gn.pth").tensors["backbone.body.layer1.0.bn1.weight"]
    assert torch.equal(found["alone"], found["zero"])
    assert not torch.equal(found["alone"], found["usual"])


def test_keep_norm_folds_standardised_weights(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "ws.pth", FLAT, 2)
    assert main(["convert", "--keep-norm", str(tmp_path / "ws.pth"), str(tmp_path / "kept.pth")]) == 0
    assert "folded into 69" in capsys.readouterr().out
    metadata = read_checkpoint(tmp_path / "kept.pth").metadata
    assert set(metadata.group_norm_groups.values()) == {4}
    assert metadata.weight_standardization == {}


def test_norms_of_unknown_groups_are_not_given_those_of_the_converted(tmp_path, capsys) -> None:
    """A backbone with frozen BN and heads with GN, as detectron2's: groups of 16 are not the heads' 32."""
    torch.manual_seed(0)
    keys = [*SMALL, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.GN.MIN_CHANNELS_PER_GROUP", "1"]
    keys += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]
    model = gn_detect.build_model(gn_detect.load_config(CONFIG, keys))
    source, target = tmp_path / "mixed.pth", tmp_path / "gn.pth"
    torch.save(model.state_dict(), source)
    assert main(["convert", str(source), str(target)]) == 2
    reported = capsys.readouterr().err
    assert "are GroupNorms already, such as 'backbone.fpn_lateral2.norm'" in reported
    assert not target.exists()
    assert main(["convert", str(source), str(target), "--min-channels-per-group", "1"]) == 0
    found = read_architecture(read_checkpoint(target)).keys
    assert (found["MODEL.GN.NUM_GROUPS"], found["MODEL.GN.MIN_CHANNELS_PER_GROUP"]) == (32, 1)
    # What an earlier version wrote is no rule for all norms, either.
    tensors, report = convert_state_dict(read_checkpoint(source).tensors)
    save_weights(target, tensors, norm_metadata({}, {layer.name: layer.groups for layer in report.layers}))
    assert "MODEL.GN.NUM_GROUPS" not in read_architecture(read_checkpoint(target)).keys


@pytest.mark.parametrize("words", [pytest.param(["--keep-norm"], marks=pytest.mark.slow), []])
def test_what_tensors_do_not_tell_stays_with_them(words, torchvision_detector, tmp_path) -> None:
    """Torchvision's RoIAlign, under other names, and a config's anchors, without the config."""
    assert main(["convert", *words, str(torchvision_detector), str(tmp_path / "new.pth")]) == 0
    found = read_architecture(read_checkpoint(tmp_path / "new.pth")).keys
    assert found["MODEL.ROI_BOX_HEAD.POOLER_TYPE"] == "ROIAlign"
    assert found["MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO"] == 2
    sizes = [[4], [8], [16], [32], [64]]
    cfg = gn_detect.load_config(CONFIG, [*BATCH_NORM, "MODEL.ANCHOR_GENERATOR.SIZES", str(sizes)])
    tensors = gn_detect.build_model(cfg).state_dict()
    save_weights(tmp_path / "own.pth", tensors, {"config": dump_config(cfg)})
    assert main(["convert", *words, str(tmp_path / "own.pth"), str(tmp_path / "own.safetensors")]) == 0
    found = read_architecture(read_checkpoint(tmp_path / "own.safetensors")).keys
    assert [list(level) for level in found["MODEL.ANCHOR_GENERATOR.SIZES"]] == sizes


@pytest.mark.slow
def test_calibrate_takes_the_eps_of_a_file_with_other_names(folder, tmp_path) -> None:
    cfg = gn_detect.load_config(CONFIG, BATCH_NORM)
    state = gn_detect.build_model(cfg).state_dict()
    torch.save(mmdetection(state, norm="bn"), tmp_path / "bn.pth")
    target, better = tmp_path / "gn.pth", tmp_path / "better.pth"
    assert main(["convert", str(tmp_path / "bn.pth"), str(target), "--eps", "0.001"]) == 0
    words = ["--images", str(folder), "--steps", "1", "--config-file", CONFIG, *BATCH_NORM]
    words += ["INPUT.MIN_SIZE_TEST", "64", "--fix-config"]
    assert main(["calibrate", str(tmp_path / "bn.pth"), str(target), str(better), *words]) == 0
    reported = read_checkpoint(better).metadata
    assert set(reported.group_norm_eps.values()) == {1e-3}
    assert reported.config_keys["MODEL.ANCHOR_GENERATOR.SIZES"]
    assert "MODEL.GN.EPS" not in reported.config_keys
