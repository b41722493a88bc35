"""Seeded damage to the folder of a run, which ``report``, ``plot``, ``replay`` and ``eval`` read."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from gn_detect.config import load_config
from gn_detect.engine import train
from gn_detect.engine.divergence import Finding, write_black_box
from gn_detect.engine.run import prepare
from gn_detect.modeling import make_model
from tests.engine.tiny import make_dataset, write_config
from tests.fuzz.checkpoints import damage_checkpoint
from tests.fuzz.configs import damage_config
from tests.fuzz.damage import damage_bytes, damage_text, damage_tree, dumps, junk, remove, replace_file
from tests.fuzz.limits import Case
from tests.fuzz.trial import Tally

BOX = "black_box/iteration_0000001"
INFERENCE = "inference/tiny_test"
DETECTIONS, WEIGHTS = f"{INFERENCE}/coco_instances_results.json", "model_final.pth"


def make_run(folder: Path) -> Path:
    """The folder of a short training, with an evaluation and a black box."""
    annotations = make_dataset(folder / "data", 4)
    config = write_config(folder, annotations, annotations)
    cfg = load_config(
        config, ["SOLVER.MAX_ITER", "3", "SOLVER.LOG_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "2"]
    )
    train(cfg)
    run = prepare(cfg, False)
    batch = [run.loader.samples[i, i] for i in range(2)]
    finding = Finding({"loss_mask": float("nan")}, None, "backbone", None)
    write_black_box(folder / "run" / BOX, run.cfg, make_model(cfg), 1, {0: batch}, {0: finding}, 1.0)
    return folder / "run"


def prepare_folders(folder: Path) -> Case:
    """Damaged folders through the commands that read what is damaged."""
    folder.mkdir()
    run = make_run(folder)
    kept = folder / "kept"
    shutil.copytree(run, kept)
    originals = {name: (kept / name).read_bytes() for name in _DAMAGE if (kept / name).is_file()}
    annotations = folder / "data" / "annotations.json"
    truth = annotations.read_bytes()

    def case(seed: int, tally: Tally) -> None:
        chance = random.Random(seed)
        shutil.rmtree(run)
        shutil.copytree(kept, run, copy_function=os.link)
        remove(annotations)
        annotations.write_bytes(truth)
        names = chance.choices(list(_DAMAGE), _WEIGHTS, k=chance.choice([1, 1, 1, 2]))
        reported = []
        for name in dict.fromkeys(names):
            path = run / name
            if chance.random() < 0.12:
                reported.append(f"{name}: {replace_file(path, chance)}")
                continue
            original = truth if name == _TRUTH else originals[name]
            path.unlink()  # never through the link
            path.write_bytes(_DAMAGE[name][0](original, chance))
            reported.append(name)
        tally.cases += 1
        label = f"folders {seed} ({', '.join(reported)})"
        commands = dict.fromkeys(command for name in names for command in _DAMAGE[name][1])
        statuses = [tally.command(label, *_words(command, run, folder)) for command in commands]
        tally.refused += 2 in statuses
        tally.passed += all(status == 0 for status in statuses)

    return case


def _words(command: str, run: Path, folder: Path) -> list[str]:
    return {
        "report": ["report", str(run), "--output", str(folder / "page.html"), "--pictures", "1"],
        "plot": ["plot", str(run), "--output", str(folder / "curves.png"), "--smooth", "2"],
        "compare": ["plot", str(run), str(folder / "kept"), "--output", str(folder / "curves.svg")],
        "replay": ["replay", str(run / BOX)],
        "eval": ["eval", "--config-file", str(run / "config.yaml"), "--weights", str(run / WEIGHTS)],
        "elsewhere": [
            "eval",
            "--config-file",
            str(folder / "tiny.yaml"),
            "--weights",
            str(folder / "kept" / WEIGHTS),
        ],
        "last": ["eval", "--config-file", str(run / "config.yaml"), "--resume"],
        "predict": [
            "predict",
            "--config-file",
            str(run / "config.yaml"),
            "--weights",
            str(run / WEIGHTS),
            "--output",
            str(folder / "found"),
            "--no-pictures",
            str(folder / "data" / "images" / "001.png"),
        ],
    }[command]


def _json(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return damage_text(data, chance)
    return dumps(damage_tree(json.loads(data), chance))


def _lines(data: bytes, chance: random.Random) -> bytes:
    """``metrics.jsonl``: a line of other things, or of which there are a million."""
    kind = chance.random()
    if kind < 0.2:
        return damage_text(data, chance)
    lines = data.splitlines()
    at = chance.randrange(len(lines))
    if kind < 0.22:
        return b"\n".join(lines * (10**6 // len(lines)))
    if kind < 0.4:
        key = chance.choice(["iteration", "iteration", *json.loads(lines[at])])
        for number in range(len(lines)) if chance.random() < 0.3 else [at]:
            lines[number] = dumps(json.loads(lines[number]) | {key: junk(chance)})
    elif kind < 0.5:
        values = [float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 10**30, -1, 1e-320, 2**63]
        key, value = (
            chance.choice(["iteration", "total_loss", "lr", "bbox/AP", "images_per_second"]),
            chance.choice(values),
        )
        lines = [dumps(json.loads(line) | {key: value}) for line in lines]
    elif kind < 0.55:
        chance.shuffle(lines)
    else:
        lines[at] = dumps(damage_tree(json.loads(lines[at]), chance))
    return b"\n".join(lines) + b"\n" * chance.randrange(2)


def _config(data: bytes, chance: random.Random) -> bytes:
    text, words = damage_config(data.decode(), chance)
    if words:
        tree = yaml.safe_load(text)
        for key, value in zip(words[::2], words[1::2], strict=False):
            *groups, last = key.split(".")
            node = tree
            for group in groups:
                node = node.setdefault(group, {}) if isinstance(node, dict) else {}
            if isinstance(node, dict):
                node[last] = value
        text = yaml.safe_dump(tree)
    return text.encode("utf-8", "surrogatepass")


def _truth(data: bytes, chance: random.Random) -> bytes:
    """Annotations of sizes that no image has, of another dataset, or damaged anywhere."""
    content = json.loads(data)
    kind = chance.random()
    if kind < 0.2:
        sizes = [-5, 0, float("inf"), float("nan"), 10**9, "64", 64.5, None, [], 10**400, True]
        for image in content["images"] if chance.random() < 0.5 else content["images"][:1]:
            image[chance.choice(["height", "width"])] = chance.choice(sizes)
        return dumps(content)
    if kind < 0.3:
        for image in content["images"]:
            image["id"] += 100
        for entry in content["annotations"]:
            entry["image_id"] += 100
        return dumps(content)
    if kind < 0.4:
        content["categories"] = chance.choice(
            [
                content["categories"][:1],
                content["categories"][::-1],
                [],
                [*content["categories"], {"id": 99, "name": "$x$"}],
            ]
        )
        return dumps(content)
    return _json(data, chance)


def _detections(data: bytes, chance: random.Random) -> bytes:
    content = json.loads(data)
    if not content or chance.random() < 0.5:
        return _json(data, chance)
    for entry in content if chance.random() < 0.3 else content[:1]:
        key = chance.choice(list(entry))
        entry[key] = junk(chance)
    return dumps(content)


def _black_box(data: bytes, chance: random.Random) -> bytes:
    return damage_checkpoint(data, chance, metadata=0.7)


def _weights(data: bytes, chance: random.Random) -> bytes:
    return damage_checkpoint(data, chance)


def _names(data: bytes, chance: random.Random) -> bytes:
    """``last_checkpoint`` and ``checkpoints.txt``."""
    other = [
        b"../../etc/passwd",
        b"/dev/zero",
        b"",
        b"\0",
        b"\xff",
        b"x" * 5000,
        b".",
        b"model_final.pth\n\n",
        b"\x1b[2J",
    ]
    return chance.choice([*other, damage_bytes(data, chance), data + b"\n" + data])


_TRUTH = "../data/annotations.json"

_DAMAGE: dict[str, tuple[Callable[[bytes, random.Random], bytes], list[str]]] = {
    "metrics.jsonl": (_lines, ["report", "plot", "compare"]),
    f"{INFERENCE}/results.json": (_json, ["report"]),
    DETECTIONS: (_detections, ["report"]),
    _TRUTH: (_truth, ["report", "elsewhere"]),
    "environment.json": (_json, ["report"]),
    "config.yaml": (_config, ["report", "eval", "predict"]),
    f"{BOX}/state.pth": (_black_box, ["replay"]),
    f"{BOX}/config.yaml": (_config, ["replay"]),
    f"{BOX}/report.json": (_json, ["replay"]),
    WEIGHTS: (_weights, ["eval", "predict"]),
    "last_checkpoint": (_names, ["last", "report"]),
    "checkpoints.txt": (_names, ["last"]),
    "results.json": (_json, ["report", "eval"]),
}
"""By file: what damages it, and the commands that read it."""

_WEIGHTS = [6, 3, 4, 4, 2, 3, 5, 2, 1, 4, 1, 1, 1]
