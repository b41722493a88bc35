"""Whole runs of a tiny model."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_detect import Predictor
from gn_detect.cli import main
from gn_detect.config import Config, dump_config, load_config
from gn_detect.data import build_test_loader
from gn_detect.engine import evaluate, train
from gn_detect.engine import trainer as trainer_module
from gn_detect.engine.evaluator import scalars_of
from gn_detect.errors import UserError
from gn_detect.modeling import MaskRCNN, build_model
from gn_detect.report.run_folder import read_run
from gn_detect.structures import Target
from gn_detect.weights import load_weights, norm_settings, read_checkpoint, save_weights
from tests.engine.tiny import make_dataset, write_config
from tests.refusal import refusal


def weights_of(cfg: Config, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return read_checkpoint(Path(cfg.output_dir) / name).tensors


def metrics_of(cfg: Config) -> list[dict]:
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory, tiny_data: tuple[Path, Path]) -> Config:
    """A run of one iteration; tests must not change its folder."""
    cfg = load_config(write_config(tmp_path_factory.mktemp("once"), *tiny_data))
    cfg = cfg.replace({"DATASETS.TEST": [], "SOLVER.MAX_ITER": 1})
    train(cfg)
    return cfg


def test_losses_go_down(tiny_config: Config) -> None:
    cfg = tiny_config.replace({"SOLVER.MAX_ITER": 20, "SOLVER.LOG_PERIOD": 5, "DATASETS.TEST": []})
    assert train(cfg) == {}
    losses = [row["total_loss"] for row in metrics_of(cfg)]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0], "0.49 to 0.64 for ten seeds, with one thread and with two"


def test_run_folder(tiny_config: Config, caplog: pytest.LogCaptureFixture) -> None:
    cfg = tiny_config.replace({"VIS.NUM_IMAGES": 1, "SOLVER.CHECKPOINT_PERIOD": 3, "TEST.EVAL_PERIOD": 4})
    with caplog.at_level(logging.INFO, logger="gn_detect"):
        results = train(cfg)
    folder = Path(cfg.output_dir)
    assert load_config(folder / "config.yaml") == cfg
    names = {path.name for path in folder.iterdir()}
    assert {"model_0000002.pth", "model_final.pth", "last_checkpoint", "metrics.jsonl", "log.txt"} <= names
    assert "model_0000005.pth" not in names  # model_final.pth is the same
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert set(results) == {"bbox", "segm", "diagnosis"}
    assert "AP" in results["segm"]
    assert set(json.loads((folder / "results.json").read_text())) == {"bbox", "segm", "diagnosis"}
    assert (folder / "inference" / "tiny_test" / "coco_instances_results.json").is_file()
    assert (folder / "inference" / "tiny_test" / "results.json").is_file()
    assert len(list((folder / "pictures").glob("tiny_test_*.png"))) == 1
    assert (folder / "pictures" / "curves.png").is_file()
    rows = metrics_of(cfg)
    assert [row["iteration"] for row in rows if "segm/AP" in row] == [3, 5]
    training = [row for row in rows if "total_loss" in row]
    assert [row["iteration"] for row in training] == [1, 2, 3, 5]
    assert training[-1]["lr"] == pytest.approx(0.02)
    assert training[-1]["images_per_second"] > 0
    assert training[-1]["total_loss"] == pytest.approx(
        sum(v for k, v in training[-1].items() if k.startswith("loss_"))
    )
    log = (folder / "log.txt").read_text()
    for word in ("iter 6/6", "eta", "data", "images/s", "memory", "of tiny_test", "segm"):
        assert word in log
        assert word in caplog.text


def test_checkpoint_is_safe_to_load_and_has_detectron2s_keys(trained_once: Config) -> None:
    content = torch.load(Path(trained_once.output_dir) / "model_final.pth", weights_only=True)
    assert {"model", "optimizer", "iteration"} <= set(content)
    assert content["iteration"] == 0
    assert content["class_names"] == ["square", "bar"]
    assert content["category_ids"] == [3, 7]
    assert set(content["model"]) == set(build_model(trained_once).state_dict())


def test_resumed_run_is_bit_identical(tiny_config: Config) -> None:
    """Also when an evaluation came in between, and with a random seed, which the checkpoint keeps."""
    keys = {"SOLVER.CHECKPOINT_PERIOD": 3, "SEED": -1, "SOLVER.MAX_ITER": 5}
    whole = tiny_config.replace({**keys, "TEST.EVAL_PERIOD": 3})
    train(whole)
    folder = Path(whole.output_dir)
    expected, rows = weights_of(whole), metrics_of(whole)
    (folder / "last_checkpoint").write_text("model_0000002.pth")
    (folder / "model_final.pth").unlink()
    train(whole, resume=True)
    found = weights_of(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = metrics_of(whole)
    assert [row["iteration"] for row in again] == [row["iteration"] for row in rows]
    assert again[-1]["segm/AP"] == rows[-1]["segm/AP"]


def test_norms_of_their_own_eps_stay_so(tiny_config: Config, tmp_path: Path) -> None:
    """From a converted checkpoint, over an interruption, into the final one and its predictions."""
    model = build_model(tiny_config)
    for norm in model.modules():
        if isinstance(norm, torch.nn.GroupNorm):
            norm.eps = 0.5
    start = tmp_path / "converted.pth"
    save_weights(start, model.state_dict(), norm_settings(model))
    keys = {"MODEL.WEIGHTS": str(start), "SOLVER.CHECKPOINT_PERIOD": 3, "SOLVER.MAX_ITER": 5}
    cfg = tiny_config.replace({**keys, "DATASETS.TEST": []})
    train(cfg)
    folder, expected = Path(cfg.output_dir), weights_of(cfg)
    assert set(read_checkpoint(folder / "model_final.pth").metadata.group_norm_eps.values()) == {0.5}
    (folder / "last_checkpoint").write_text("model_0000002.pth")
    (folder / "model_final.pth").unlink()
    train(cfg, resume=True)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(cfg).items())
    predictor = Predictor(cfg.replace({"MODEL.WEIGHTS": str(folder / "model_final.pth")}))
    assert {m.eps for m in predictor.model.modules() if isinstance(m, torch.nn.GroupNorm)} == {0.5}


def test_run_is_reproducible_and_depends_on_the_seed(tiny_config: Config) -> None:
    cfg = tiny_config.replace({"DATASETS.TEST": [], "SOLVER.MAX_ITER": 2})
    found = []
    for seed in (1, 1, 2):
        train(cfg.replace({"SEED": seed}))
        found.append(weights_of(cfg)["backbone.fpn_output2.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_finished_run_is_only_evaluated(tiny_config: Config) -> None:
    cfg = tiny_config.replace({"SOLVER.MAX_ITER": 2})
    first = train(cfg)
    before = weights_of(cfg)
    assert scalars_of(train(cfg, resume=True)) == pytest.approx(scalars_of(first), nan_ok=True)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(cfg).items())


def test_new_run_forgets_an_old_runs_checkpoint(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config.replace({"DATASETS.TEST": [], "SOLVER.MAX_ITER": 1})
    train(cfg)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    assert not (Path(cfg.output_dir) / "last_checkpoint").exists()


def test_best_checkpoint_is_kept_and_printed(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With the score thresholds of its evaluation; the last checkpoint has those of the last one."""
    values = iter([10.0, 30.0, 20.0])

    def fake(*_: object) -> dict:
        value = next(values)
        found = {"threshold": {"score": value / 50}, "thresholds": {"square": {"score": 0.7}, "bar": None}}
        return {"bbox": {"AP": 1.0}, "segm": {"AP": value}, "diagnosis": {"segm": found}}

    monkeypatch.setattr(trainer_module, "evaluate_test_sets", fake)
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_config))
    assert main(["train", "--config-file", str(config), "TEST.EVAL_PERIOD", "2"]) == 0
    assert "segm/AP was best after 4 iterations: 30.00, kept as model_best.pth" in capsys.readouterr().out
    best = read_checkpoint(Path(tiny_config.output_dir) / "model_best.pth")
    assert best.metadata.iteration == 3
    assert best.metadata.others["segm/AP"] == 30.0
    assert best.metadata.score_thresholds == [0.7, 0.6]
    final = Path(tiny_config.output_dir) / "model_final.pth"
    assert read_checkpoint(final).metadata.score_thresholds == [0.7, 0.4]
    assert Predictor.from_pretrained(final, {"MODEL.DEVICE": "cpu"}).score_thresholds == [0.7, 0.4]


def test_evaluation_of_a_checkpoint_gives_the_runs_ap_and_the_predictors_detections(
    tiny_config: Config,
) -> None:
    cfg = tiny_config.replace({"SOLVER.MAX_ITER": 80, "SOLVER.CLIP_GRADIENTS.ENABLED": True})
    trained = train(cfg)
    # 13 to 44, both, for ten seeds of data and training, with one thread and with two: something is found.
    assert trained["bbox"]["AP"] > 2
    assert trained["segm"]["AP"] > 2
    path = str(Path(cfg.output_dir) / "model_final.pth")
    keys = {"MODEL.WEIGHTS": path, "OUTPUT_DIR": cfg.output_dir + "_again", "TEST.IMS_PER_BATCH": 2}
    again = evaluate(cfg.replace(keys))
    for kind in ("bbox", "segm"):
        assert again[kind] == pytest.approx(trained[kind], nan_ok=True)
    assert evaluate(cfg, resume=True)["bbox"] == pytest.approx(trained["bbox"], nan_ok=True)
    assert read_run(cfg.output_dir + "_again").tests[0].metrics["bbox"]["AP"] == again["bbox"]["AP"]
    elsewhere = {name: entry.model_dump(by_alias=True) for name, entry in cfg.datasets.registered.items()}
    same = dict(elsewhere["tiny_test"])
    same["ANNOTATIONS"] = os.path.relpath(same["ANNOTATIONS"])
    assert evaluate(cfg.replace({"DATASETS.REGISTER": {**elsewhere, "tiny_test": same}}), resume=True)
    elsewhere["tiny_test"] = elsewhere["tiny_train"]
    with pytest.raises(UserError, match="holds a run whose 'tiny_test' is .* add another OUTPUT_DIR"):
        evaluate(cfg.replace({"DATASETS.REGISTER": elsewhere}), resume=True)

    predictor = Predictor(cfg.replace({"MODEL.WEIGHTS": path}))
    assert predictor.class_names == ["square", "bar"]
    assert predictor.category_ids == [3, 7]
    file = Path(cfg.output_dir) / "inference" / "tiny_test" / "coco_instances_results.json"
    results = json.loads(file.read_text())
    _, dataset = build_test_loader(cfg, "tiny_test")
    assert len(results) > 0
    for record in dataset.images:
        found = predictor(record.file_name)
        scores = [r["score"] for r in results if r["image_id"] == record.id]
        assert found.scores.tolist() == pytest.approx(scores, abs=1e-5)
        assert found.masks is not None
        assert found.masks.shape[1:] == (record.height, record.width)


def test_published_weights_of_coco_have_its_categories(tmp_path: Path) -> None:
    """They tell no names; a set of the user's own with as many classes is not taken for COCO."""
    narrow = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "32"]
    narrow += ["MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
    narrow += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "32"]
    cfg = load_config("GN/mask_rcnn_R_50_FPN_3x_gn.yaml", [*narrow, "MODEL.DEVICE", "cpu"])
    save_weights(tmp_path / "model.pth", build_model(cfg).state_dict())
    cfg = cfg.replace({"MODEL.WEIGHTS": str(tmp_path / "model.pth")})
    predictor = Predictor(cfg)
    assert predictor.class_names[0] == "person"
    assert predictor.class_names[79] == "toothbrush"
    assert predictor.category_ids[11:13] == [13, 14]
    assert predictor.category_ids[79] == 90
    own = Predictor(cfg.replace({"DATASETS.TRAIN": ["own"]}))
    assert own.class_names[0] == "class 0"
    assert own.category_ids[79] == 80


@pytest.mark.parametrize(
    ("choice", "channels_last"),
    [("auto", False), (True, True), pytest.param(False, False, marks=pytest.mark.slow)],
)
def test_detection_is_in_nchw_unless_channels_last_is_asked_for(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, choice: object, channels_last: bool
) -> None:
    """In training's evaluations, of the average too, in its pictures, in ``evaluate`` and in a Predictor."""
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    seen = []
    detect = MaskRCNN.detect

    def record(self: MaskRCNN, images: list[torch.Tensor], *sizes: object, **options: bool) -> object:
        kernel = self.backbone.bottom_up.stem.conv1.weight
        seen.append((self.memory_format, kernel.is_contiguous(memory_format=wanted)))
        return detect(self, images, *sizes, **options)

    monkeypatch.setattr(MaskRCNN, "detect", record)
    keys = {"SOLVER.EMA.ENABLED": True, "VIS.NUM_IMAGES": 1, "SOLVER.MAX_ITER": 2}
    keys["MODEL.CHANNELS_LAST"] = choice
    cfg = tiny_config.replace(keys)
    train(cfg)
    during = len(seen)
    trained = cfg.replace({"MODEL.WEIGHTS": str(Path(cfg.output_dir) / "model_final.pth")})
    evaluate(trained)
    assert during > 1
    assert len(seen) > during
    assert set(seen) == {(wanted, True)}
    assert Predictor(trained).model.memory_format is wanted
    assert build_model(cfg).memory_format is (torch.channels_last if choice else torch.contiguous_format)


def test_predictor_refuses_what_is_not_an_image(trained_once: Config) -> None:
    weights = str(Path(trained_once.output_dir) / "model_final.pth")
    predictor = Predictor(trained_once.replace({"MODEL.WEIGHTS": weights}))
    with pytest.raises(ValueError, match="uint8"):
        predictor(torch.zeros(3, 8, 8).numpy())
    with pytest.raises(UserError, match="nowhere.jpg"):
        predictor("nowhere.jpg")


def test_every_parameter_takes_part_without_objects(tiny_config: Config) -> None:
    """Otherwise several processes would wait for each other's gradients for ever."""
    model = build_model(tiny_config).train()
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [])
    sum(model([torch.zeros(3, 64, 64)], [empty]).values()).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
def test_divergence_is_reported_with_iteration_losses_and_images(tiny_config: Config, norm: str) -> None:
    keys = {
        "SOLVER.BASE_LR": 1e30,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.LOG_PERIOD": 1,
        "SOLVER.CHECKPOINT_PERIOD": 3,
    }
    cfg = tiny_config.replace({**keys, "MODEL.RESNETS.NORM": norm, "DATASETS.TEST": []})
    with pytest.raises(UserError) as caught:
        train(cfg)
    message = str(caught.value)
    assert "diverged" in message
    assert "\n" not in message
    assert not list(Path(cfg.output_dir).glob("model_*.pth"))


def test_losses_that_are_not_finite_name_their_images(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = trainer_module.train_step, []

    def spoiled(*args: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        calls.append([sample.image_id for sample in args[2]])  # type: ignore[attr-defined]
        losses, broken = real(*args)  # type: ignore[arg-type]
        bad = {"loss_cls": torch.tensor(float("nan"))}
        return (losses, broken) if len(calls) < 4 else (losses | bad, torch.ones(()))

    monkeypatch.setattr(trainer_module, "train_step", spoiled)
    with pytest.raises(UserError, match="diverged at iteration 3: .*loss_cls nan.*BASE_LR") as caught:
        train(tiny_config.replace({"SOLVER.LOG_PERIOD": 6, "DATASETS.TEST": []}))
    assert f"image ids {', '.join(map(str, calls[3]))}" in str(caught.value)


def test_fine_tuning_on_other_classes(trained_once: Config, tmp_path: Path) -> None:
    """The predictors start afresh and everything else is taken over."""
    path = Path(trained_once.output_dir) / "model_final.pth"
    data = make_dataset(tmp_path / "other", 2)
    content = json.loads(data.read_text())
    content["categories"].append({"id": 99, "name": "third"})
    data.write_text(json.dumps(content))
    folder = tmp_path / "second"
    folder.mkdir()
    keys = ["MODEL.WEIGHTS", str(path), "MODEL.ROI_HEADS.NUM_CLASSES", "3", "SOLVER.BASE_LR", "1e-12"]
    second = load_config(write_config(folder, data), keys).replace({"SOLVER.MAX_ITER": 1})
    train(second)
    before, after = weights_of(trained_once), weights_of(second)
    assert torch.allclose(
        before["backbone.fpn_output2.weight"], after["backbone.fpn_output2.weight"], atol=1e-9
    )
    model = build_model(second)
    load_weights(model, Path(second.output_dir) / "model_final.pth")


def test_an_early_stop_records_augmented_ap(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmented evaluation follows the last iteration, also if a patience decides which that is."""
    values = iter([30.0, 20.0, 20.0])

    def fake(*positional: Any, augmented: bool = False) -> dict:
        with_aug = augmented or positional[-1] is True
        return {"bbox": {"AP": next(values)}, **({"bbox_TTA": {"AP": 35.0}} if with_aug else {})}

    monkeypatch.setattr(trainer_module, "evaluate_test_sets", fake)
    keys = {"SOLVER.MAX_ITER": 6, "TEST.EVAL_PERIOD": 1, "SOLVER.EARLY_STOP.PATIENCE": 1}
    aug = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": [64], "TEST.AUG.MAX_SIZE": 96}
    cfg = tiny_config.replace({**keys, **aug, "MODEL.MASK_ON": False})
    assert train(cfg)["bbox_TTA"]["AP"] == 35.0
    rows = [row for row in metrics_of(cfg) if "bbox/AP" in row]
    assert [(row["iteration"], row.get("bbox_TTA/AP")) for row in rows] == [(0, None), (1, 35.0)]
    final = read_checkpoint(Path(cfg.output_dir) / "model_final.pth").metadata
    assert (final.iteration, final.results["bbox_TTA/AP"]) == (1, 35.0)


def test_training_ends_when_nothing_gets_better(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The count goes on in a resumed run, and more patience lets a stopped run go on."""
    values = iter([10.0, 30.0, 20.0, 25.0, 25.0, 40.0, 5.0])

    def fake(*_: object) -> dict:
        return {"bbox": {"AP": 1.0}, "segm": {"AP": next(values)}}

    monkeypatch.setattr(trainer_module, "evaluate_test_sets", fake)
    keys = {"SOLVER.MAX_ITER": 6, "TEST.EVAL_PERIOD": 1, "SOLVER.CHECKPOINT_PERIOD": 3}
    cfg = tiny_config.replace({**keys, "SOLVER.EARLY_STOP.PATIENCE": 2})
    folder = Path(cfg.output_dir)
    with caplog.at_level(logging.INFO, logger="gn_detect"):
        assert train(cfg)["segm"]["AP"] == 25.0
    assert "no better segm/AP in 2 evaluations" in caplog.text
    assert read_checkpoint(folder / "model_final.pth").metadata.iteration == 3
    assert read_checkpoint(folder / "model_best.pth").metadata.iteration == 1
    assert [row["iteration"] for row in metrics_of(cfg) if "segm/AP" in row] == [0, 1, 2, 3]

    train(cfg, resume=True)  # is evaluated once more, as every finished run
    assert read_checkpoint(folder / "model_final.pth").metadata.iteration == 3

    train(cfg.replace({"SOLVER.EARLY_STOP.PATIENCE": 4}), resume=True)
    assert read_checkpoint(folder / "model_final.pth").metadata.iteration == 5
    assert read_checkpoint(folder / "model_best.pth").metadata.iteration == 4
    with refusal("conflicting-keys", "SOLVER.EARLY_STOP.PATIENCE", "TEST.EVAL_PERIOD"):
        cfg.replace({"TEST.EVAL_PERIOD": 0})
