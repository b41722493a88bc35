"""Seeded damage to configs: values of all kinds at all keys, other keys, broken YAML, broken overrides."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import yaml

from gn_detect.config import Config, dump_config, load_config
from gn_detect.config.load import known_keys
from gn_detect.config.types import to_plain, value_at
from gn_detect.data import build_train_loader, check_classes
from gn_detect.engine.optimizer import build_optimizer
from gn_detect.errors import UserError
from gn_detect.modeling import make_model
from tests.fuzz.trial import Tally

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 5, 0.5, -0.5, 1e-30, 1e30, float("nan"), float("inf"), 10**25, "", "x",
    "GN", "BN", "auto", "1", "[1, 2]", "{", "a: b: c", [], [0], [-1], [1], [[]], [[1]], [[8, 16]], ["p2"],
    ["res2", "res9"], [1, "x"], {}, {"A": 1}, [3, 1, 2], [0.5, 0.5], "\ud800", "nowhere.pth",
    [[0.0]], [[0.5, 1.0, 2.0]],
]  # fmt: skip

MOST = 4096
"""A model of larger numbers is not built: it would take long, and need not be wrong."""


def try_config(base: Path, seed: int, tally: Tally) -> None:
    """One damaged config: loaded, written and read back, and a training step made with it."""
    chance = random.Random(seed)
    foreign = random.Random(f"foreign {seed}")  # of its own, so that older numbers stay what they are
    if seed >= _FIRST_FOREIGN and foreign.random() < 0.3:
        text, overrides = _foreign_config(base, foreign), []
    else:
        text, overrides = damage_config(base.read_text(), chance)
    path = base.with_name("fuzz.yaml")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    label = f"config {seed} {overrides}"
    tally.cases += 1
    outcome = tally.attempt(label, load_config, path, overrides)
    if isinstance(outcome, Config):
        again = path.with_name("again.yaml")
        again.write_bytes(dump_config(outcome).encode("utf-8", "surrogatepass"))
        second = tally.attempt(f"{label}, read back", load_config, again)
        if isinstance(second, Config) and repr(second) != repr(outcome):
            tally.failures.append(f"{label}: wrong success: it comes back otherwise")
        if isinstance(second, UserError):
            tally.failures.append(f"{label}: wrong success: what it wrote is refused: {second}")
        if not _is_large(yaml.safe_load(dump_config(outcome))):
            outcome = tally.attempt(f"{label} {text if not overrides else ''}", train_once, outcome)
    if isinstance(outcome, UserError):
        tally.refused += 1
    elif outcome is not None:
        tally.passed += 1


def train_once(cfg: Config) -> str:
    """What training does up to its first step."""
    loader, dataset = build_train_loader(cfg)
    check_classes(dataset, cfg.model.roi_heads.num_classes)
    if cfg.dataloader.num_workers or cfg.solver.ims_per_batch > 8:
        return "not tried: it starts processes or takes long"
    model = make_model(cfg).train()
    build_optimizer(cfg, model)
    batch = next(iter(loader))
    with torch.no_grad():
        model([s.image for s in batch], [s.target for s in batch])
    return "trained"


_FIRST_FOREIGN = 10_000
"""Number of a case."""


def _foreign_config(base: Path, chance: random.Random) -> str:
    """What is small and would become large or endless; names of files, and bytes of other encodings."""
    text, folder = base.read_text(), base.parent
    bomb = "A0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"A{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, chance.choice([3, 9, 30]))
    )
    kind = chance.choice(["bomb", "bases", "loop", "names", "deep", "long", "merge", "value", "huge"])
    if kind == "bomb":
        return chance.choice(
            [bomb, bomb + text, text + bomb, f"OUTPUT_DIR: {bomb!r}\n", "&a [*a]", "A: &a {B: *a}\n"]
        )
    if kind == "bases":
        depth = chance.choice([3, 26])
        for i in range(depth):
            names = [f"base{i + 1}.yaml"] * 2 if i + 1 < depth else []
            (folder / f"base{i}.yaml").write_text(f"_BASE_: {names}\nSEED: {i}\n" if names else "SEED: 7\n")
        return "_BASE_: base0.yaml\n" + text
    if kind == "loop":
        (folder / "base0.yaml").write_text("_BASE_: fuzz.yaml\n")
        return chance.choice(["_BASE_: base0.yaml\n", "_BASE_: fuzz.yaml\n", "_BASE_: .\n"]) + text
    if kind == "names":
        names = [
            "/dev/zero",
            "/proc/self/mem",
            "images",
            "annotations.json",
            "a\nb",
            "~",
            "",
            "[[x]]",
            "{a: b}",
            "5",
        ]
        return f"_BASE_: {chance.choice([*names, '[/dev/zero, tiny.yaml]'])}\n{text}"
    if kind == "deep":
        return chance.choice(
            ["[" * 5000, "{A: " * 5000, "SEED: " + "[" * 3000 + "]" * 3000, "- " * 20_000, "? " * 5000]
        )
    if kind == "long":
        digits = "1" * chance.choice([100, 5000, 100_000])
        return text + chance.choice(
            [f"SEED: {digits}\n", f"OUTPUT_DIR: {digits}x\n", f"VERSION: 0x{digits}\n", "#" + digits]
        )
    if kind == "merge":
        return (
            "A: &a {SEED: 1}\n"
            + text
            + chance.choice(["<<: *a\n", "<<: [*a, *a]\n", "<<: 5\n", "=: 5\n", "SEED: !!int x\n"])
        )
    if kind == "value":
        values = [
            "!!bool maybe",
            "!!timestamp 2",
            "2001-99-99",
            "1:2:3",
            "!!binary x",
            "!!set {a}",
            "!!python/name:os.system",
            "0o9",
        ]
        return text + f"VERSION: {chance.choice(values)}\n"
    tree = yaml.safe_load(text)
    sections = [section for section in tree["MODEL"].values() if isinstance(section, dict)]
    for section in chance.sample(sections, 2):
        for key, value in section.items():
            if type(value) is int:
                section[key] = chance.choice([10**4, 10**6, 10**9, 2**31, 2**62, 0, -1])
    return yaml.safe_dump(tree)


def damage_config(text: str, chance: random.Random) -> tuple[str, list[str]]:
    tree = yaml.safe_load(text)
    kind = chance.random()
    if kind < 0.15:
        at = chance.randrange(len(text))
        return text[:at] + chance.choice(["", ":", "\t", "- ", "{", "&a ", "*b", "!!x ", "\x00", "%"]) + text[
            at + chance.randrange(3) :
        ], []
    if kind < 0.65:
        keys = [chance.choice(known_keys()) for _ in range(chance.choice([1, 1, 2]))]
        words = [word for key in keys for word in (key, _spelled(_value(key, chance)))]
        return text, words[:-1] if chance.random() < 0.05 else words
    node = tree
    while chance.random() < 0.8:
        inner = [value for value in node.values() if isinstance(value, dict) and value]
        if not inner:
            break
        node = chance.choice(inner)
    key = chance.choice(list(node))
    if kind < 0.9:
        node[key] = chance.choice(JUNK)
    else:
        node[chance.choice([key.lower(), f"{key}X", "A.B", "_BASE_", ""])] = node.pop(key)
    return yaml.safe_dump(tree), []


def _value(key: str, chance: random.Random) -> Any:
    """Mostly of the kind that belongs to a key, so that more than its type can be wrong."""
    usual = to_plain(value_at(Config(), key))
    if chance.random() < 0.3:
        return chance.choice(JUNK)
    return chance.choice([value for value in JUNK if _alike(value, usual)] or JUNK)


def _alike(value: Any, usual: Any) -> bool:
    numbers = int | float
    if isinstance(usual, bool) or isinstance(value, bool):
        return isinstance(usual, bool) and isinstance(value, bool)
    if isinstance(usual, list | tuple):
        return isinstance(value, list) and (not usual or not value or _alike(value[0], usual[0]))
    return isinstance(value, numbers) if isinstance(usual, numbers) else isinstance(value, type(usual))


def _spelled(value: Any) -> str:
    """As on a command line."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    return text.strip().removesuffix("...").strip()


def _is_large(value: Any) -> bool:
    if isinstance(value, dict):
        skipped = ("SOLVER", "TEST", "VIS", "SEED")
        return any(_is_large(v) for k, v in value.items() if k not in skipped)
    if isinstance(value, list | tuple):
        return any(map(_is_large, value))
    return isinstance(value, int | float) and abs(value) > MOST
