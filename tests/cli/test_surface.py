"""Help, exit status, JSON, completion and the config commands."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from gn_detect.cli import main, parser
from gn_detect.cli.main import COMMANDS, load_command, parse
from gn_detect.config.explain import facts
from gn_detect.config.load import known_keys
from tests.cli.conftest import Case


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_status(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert (
        f"  gn-detect {command} " in printed
        or f"  gn-detect --json {command} " in printed
        or "completion" in command
    )
    assert "exit status:" in printed
    assert "--quiet" in printed


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("eval --config x.yaml", "--config; did you mean --config-file?"),
        ("predict --t 0.5 a", "--t; did you mean --trust or --threshold or --tile?"),
        ("bench train --iter=3", "--iter; did you mean --iterations?"),
        ("predict --score 0.5 a", "--score; gn-detect predict --help"),
        ("predict --device cpu a", "--device; it is a config key, given after the command: MODEL.DEVICE"),
        ("train --num-epochs 12", "--num-epochs; did you mean --epochs?"),
        ("train --lr=0.1", "given after the command: SOLVER.BASE_LR VALUE"),
        ("train --learning_rate 0.1", "SOLVER.BASE_LR VALUE"),
        ("train -b 4", "-b; it is a config key, given after the command: SOLVER.IMS_PER_BATCH"),
        ("train --batch-size 4", "SOLVER.IMS_PER_BATCH"),
        ("train --imgsz 640", "INPUT.MIN_SIZE_TRAIN"),
        ("train --workers 4", "DATALOADER.NUM_WORKERS VALUE"),
        ("train --device cpu", "MODEL.DEVICE, which is cpu"),
        ("train --gpus 2", "did you mean --num-gpus?"),
        ("predict --gpus 2 a", "MODEL.DEVICE"),
        ("train --seed 2", "SEED VALUE"),
        ("train --output a", "OUTPUT_DIR VALUE"),
        ("train --work-dir a", "OUTPUT_DIR VALUE"),
        ("export --out a", "did you mean --output?"),
        ("train --dataset a", "did you mean --data?"),
        ("train --load-from a.pth", "did you mean --weights?"),
        ("predict --conf 0.5 a", "--conf; did you mean --threshold?"),
        ("eval --conf 0.5", "MODEL.ROI_HEADS.SCORE_THRESH_TEST VALUE"),
        ("predict --source a", "images are given without a flag"),
        ("train epochs=12", "epochs=12: key and value stand apart here, as in SOLVER.MAX_ITER 12"),
        ("train solver.base_lr=0.1", "as in SOLVER.BASE_LR 0.1"),
        ("config lr 0.1", "lr: unknown key; its name here is SOLVER.BASE_LR"),
        ("plot --seed 1 a", "--seed; gn-detect plot --help"),
        ("doctor a --imgaes b", "--imgaes; did you mean --images?"),
        ("--versoin", "--versoin; did you mean --version?"),
        ("bench norm --layer stm", "'stm'; did you mean stem?"),
        ("bench norm --layer box", "'box' (choose from"),
        ("bench", "required: mode; gn-detect bench --help"),
    ],
)
def test_a_mistake_gets_advice(command: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert advice in line


def test_every_key_that_is_advised_exists() -> None:
    answers = {answer for answers in parser._HABITS.values() for answer in answers}
    named = {key for answer in answers for key in re.findall(r"[A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)+", answer)}
    assert len(named) > 25
    assert named <= set(known_keys())
    flags = {flag for command in COMMANDS for flag in flags_of(load_command(command))}
    assert {answer for answer in answers if answer.startswith("--")} <= flags
    names = [name for names in parser._HABITS for name in names.split()]
    assert len(names) == len(set(names))


def flags_of(command: ModuleType) -> set[str]:
    made = argparse.ArgumentParser()
    command.add_arguments(made)
    return set(made._option_string_actions)


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    printed = capsys.readouterr()
    assert caught.value.code == 0
    assert printed.err == ""
    assert "usage: gn-detect" in printed.out
    assert all(re.search(f"^    {command}\\b", printed.out, re.MULTILINE) for command in COMMANDS)


def test_after_two_dashes_nothing_is_a_flag() -> None:
    assert parse(["predict", "a", "--threshold", "0.5", "--", "-b.jpg"]).inputs == ["a", "-b.jpg"]
    assert parse(["train", "SEED", "1", "--resume", "SOLVER.BASE_LR", "-1"]).overrides[2:] == [
        "SOLVER.BASE_LR",
        "-1",
    ]
    assert parse(["zoo", "info", "R-50-GN", "--json", "R-101-GN"]).names == ["R-50-GN", "R-101-GN"]


def test_a_merged_config_is_printed(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--config-file", str(case.config), "SOLVER.BASE_LR", "0.5"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["SOLVER"]["BASE_LR"] == 0.5
    assert printed["MODEL"]["GN"]["NUM_GROUPS"] == 4


@pytest.mark.parametrize(
    ("words", "key", "count"),
    [
        ("anchor", "MODEL.ANCHOR_GENERATOR.SIZES", 8),
        ("learning rate", "SOLVER.BASE_LR", 7),  # in the meaning alone
        ("Gradient clipping", "SOLVER.CLIP_GRADIENTS.ENABLED", 5),  # one of the words
        ("nms_thresh", "MODEL.RPN.NMS_THRESH", 2),
        ("epochs", "SOLVER.MAX_ITER", 2),  # another tool's name
        ("batch size", "SOLVER.IMS_PER_BATCH", 3),
        ("lr", "SOLVER.BASE_LR", 4),
    ],
)
def test_keys_are_found_by_words(
    words: str, key: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--json", "config", "explain", *words.split()]) == 0
    printed = capsys.readouterr()
    found = [fact["key"] for fact in json.loads(printed.out)]
    assert key in found and len(found) >= count and len(found) < 2 * count + 1, found
    assert f"{key}" in printed.err


@pytest.mark.parametrize(
    ("word", "advice"),
    [("momentm", "did you mean SOLVER.MOMENTUM?"), ("qqqq", "gn-detect config reference lists all")],
)
def test_a_word_that_no_key_has(word: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", word]) == 2
    assert advice in capsys.readouterr().err


def test_a_key_and_a_group_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", "solver.amp.dtype"]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("SOLVER.AMP.DTYPE", "default  float16", "float16, bfloat16"))
    assert main(["--json", "config", "explain", "MODEL.GN"]) == 0
    assert [fact["key"] for fact in json.loads(capsys.readouterr().out)] == [
        "MODEL.GN.NUM_GROUPS",
        "MODEL.GN.MIN_CHANNELS_PER_GROUP",
        "MODEL.GN.EPS",
    ]


def test_every_key_has_a_text() -> None:
    assert all(fact.text for fact in facts())


def test_strict_doctor_and_its_json(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.edit(lambda content: content["annotations"][0].update(category_id=55))
    arguments = ["doctor", str(case.train), "--images", str(case.train.parent / "images")]
    assert main([*arguments, "--strict"]) == 1
    assert capsys.readouterr().err == ""
    for words in (["--json", *arguments], [*arguments, "--json"]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["parts"]


@pytest.mark.parametrize(
    ("words", "kept", "advice"),
    [
        ("doctor --json a.json --images i", "doctor a.json --images i", "write doctor FILE"),
        ("--json doctor --json a --json=b --strict", "--json doctor a b --strict", "write doctor FILE"),
        ("bench norm --json f.json SEED 1", "bench norm --output f.json SEED 1", "write bench --output FILE"),
        ("bench --json=f train", "bench --output f train", "write bench --output FILE"),
        ("doctor a.json --json --images i", "", ""),
        ("bench --json train --json SOLVER.AMP.ENABLED True", "", ""),
        ("zoo info a --json b", "", ""),
    ],
)
def test_json_with_a_file_is_deprecated(
    words: str, kept: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words.split()
    command = next(word for word in given if not word.startswith("-"))
    assert parser.without_old_json(command, given) == (kept or words).split()
    warning = f"warning: {command} --json FILE is deprecated; {advice}\n" if kept else ""
    assert capsys.readouterr().err == warning
    parser.without_old_json(command, [*given, "--quiet"])
    assert capsys.readouterr().err == ""


def test_the_old_json_of_the_doctor_works(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    parts = (case.train, case.val)
    words = [("--json", str(path), "--images", str(path.parent / "images")) for path in parts]
    assert main(["doctor", *words[0], *words[1]]) == 0
    printed = capsys.readouterr()
    assert "0 errors" in printed.out
    assert "deprecated" in printed.err


def test_the_zoo_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "info", "R-50-GN", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["name"] == "R-50-GN"
    assert entry["is_downloaded"] in (True, False)


def test_plot_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    lines = [{"iteration": i, "total_loss": 1.0 / (i + 1), "lr": 0.01, "time": 0.1} for i in range(3)]
    for folder in (run, other):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["plot", str(run), "--output", str(tmp_path / "curves.svg"), str(other)]) == 0
    capsys.readouterr()
    assert main(["plot", "--json", str(run)]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(run / "curves.png"), "runs": ["run"]}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_the_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="needs the extra 'completion'")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--train-json" in script or "train-json" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
