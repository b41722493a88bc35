"""Seeded damage to checkpoints: their metadata, tensors and bytes, and the zip archive around them."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gn_detect.config import load_config
from gn_detect.engine import Predictor, train
from gn_detect.engine.run import prepare
from gn_detect.errors import UserError
from gn_detect.export.write import ExportMetadata
from gn_detect.modeling import make_model
from gn_detect.weights import (
    Checkpoint,
    implied_keys,
    load_weights,
    norm_settings,
    read_architecture,
    read_checkpoint,
    save_weights,
)
from tests.engine.tiny import make_dataset, write_config
from tests.fuzz.damage import damage_bytes, damage_text, junk, remove, replace_file
from tests.fuzz.limits import Case
from tests.fuzz.trial import Tally


def prepare_checkpoints(folder: Path) -> Case:
    """Damaged checkpoints through all that reads them."""
    annotations = make_dataset(folder / "data", 2)
    config = write_config(folder, annotations, annotations)
    cfg = load_config(config, ["SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"])
    train(cfg)
    run = folder / "run"
    first, last = run / "model_0000000.pth", run / (run / "last_checkpoint").read_text()
    again = first.read_bytes(), (run / "checkpoints.txt").read_bytes()
    model = make_model(cfg)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-3
    bases = {".pth": last.read_bytes()}
    settings = norm_settings(model).to_dict() | {"class_names": ["square", "bar"], "category_ids": [3, 7]}
    for suffix in (".pkl", ".safetensors", ".pt"):
        path = folder / f"base{suffix}"
        save_weights(path, model.state_dict(), settings)
        bases[suffix] = path.read_bytes()
    image = np.zeros((64, 80, 3), dtype=np.uint8)
    found = Predictor(cfg.replace({"MODEL.WEIGHTS": str(last)}))
    stride = found.model.size_divisibility
    exported = ExportMetadata(cfg, found.class_names, found.category_ids, [], stride, "0").to_strings()
    names = last.name

    def case(seed: int, tally: Tally) -> None:
        chance = random.Random(seed)
        tally.cases += 1
        if chance.random() < 0.1:
            reported = {**exported}
            key = chance.choice(list(reported))
            reported[key] = chance.choice(
                [_text(chance), damage_text(reported[key].encode(), chance).decode("utf-8", "replace")]
            )
            outcome = tally.attempt(
                f"checkpoints {seed} (ONNX's {key})", ExportMetadata.from_strings, reported, Path("m.onnx")
            )
            tally.refused += isinstance(outcome, UserError)
            tally.passed += isinstance(outcome, ExportMetadata)
            return
        suffix = chance.choice([".pth", ".pth", ".pth", ".pkl", ".safetensors", ".pt"])
        path = folder / f"damaged{suffix}"
        data = damage_checkpoint(bases[suffix], chance)
        path.write_bytes(data)
        label = f"checkpoints {seed} ({suffix})"
        read = tally.attempt(label, read_checkpoint, path)
        outcomes = [read]
        if isinstance(read, Checkpoint):
            tally.attempt(f"{label}, architecture", read_architecture, read)
            tally.attempt(f"{label}, input", implied_keys, cfg, read)
            for training in (True, False):
                fresh = make_model(cfg)
                outcomes.append(
                    tally.attempt(
                        f"{label}, weights",
                        lambda training=training, fresh=fresh: load_weights(
                            fresh, path, for_training=training, config=cfg, class_names=["square", "bar"]
                        ),
                    )
                )
            predictor = tally.attempt(
                f"{label}, predictor", Predictor, cfg.replace({"MODEL.WEIGHTS": str(path)})
            )
            if isinstance(predictor, Predictor):
                tally.attempt(f"{label}, detect", predictor, image)
                tally.attempt(f"{label}, names", _use_names, predictor)
            if chance.random() < 0.3:
                target = folder / f"converted{chance.choice(['.pth', '.safetensors', '.pkl'])}"
                tally.command(label, "convert", "--keep-norm", str(path), str(target))
        if suffix == ".pth":
            for other in run.glob("model_*"):
                remove(other)
            first.write_bytes(again[0])
            last.write_bytes(data)
            (run / "checkpoints.txt").write_bytes(again[1])
            (run / "last_checkpoint").write_text(names)
            if chance.random() < 0.05:
                replace_file(last, chance)
            outcomes.append(tally.attempt(f"{label}, resume", prepare, cfg, True))
        tally.refused += any(isinstance(outcome, UserError) for outcome in outcomes)
        tally.passed += not any(isinstance(outcome, UserError) or outcome is None for outcome in outcomes)

    return case


def _use_names(predictor: Predictor) -> None:
    """As pictures, results and exports do."""
    if not all(isinstance(name, str) for name in predictor.class_names):
        raise TypeError(f"class names {predictor.class_names}")
    if not all(type(i) is int for i in predictor.category_ids):
        raise TypeError(f"category ids {predictor.category_ids}")


def damage_checkpoint(data: bytes, chance: random.Random, metadata: float = 0.4) -> bytes:
    """Damage of one kind.

    Args:
        metadata: how often it is what stands beside the weights.
    """
    kind = chance.random()
    if kind < metadata:
        return _rewritten(data, chance, _damage_metadata)
    rest = (kind - metadata) / (1 - metadata)
    if rest < 0.35:
        return _rewritten(data, chance, _damage_tensors)
    if rest < 0.85 or data[:2] != b"PK":
        return damage_bytes(data, chance)
    return _damage_archive(data, chance)


def _rewritten(data: bytes, chance: random.Random, damage: Callable[[Any, random.Random], Any]) -> bytes:
    """The content of a file, of its format, with other values."""
    if data[:2] == b"PK":
        content = torch.load(io.BytesIO(data), weights_only=True)
        file = io.BytesIO()
        torch.save(damage(content, chance), file)
        return file.getvalue()
    if data[:1] == b"\x80":
        content = pickle.loads(data)
        return pickle.dumps(damage(content, chance), protocol=2)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if chance.random() < 0.5:
        reported = header["__metadata__"]
        reported[chance.choice(list(reported))] = _text(chance)
    else:
        names = [name for name in header if name != "__metadata__"]
        entry = header[chance.choice(names)]
        entry[chance.choice(list(entry))] = junk(chance)
    text = json.dumps(header).encode("utf-8", "replace")
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _text(chance: random.Random) -> str:
    value = junk(chance)
    return value if isinstance(value, str) and chance.random() < 0.5 else json.dumps(value)


def _damage_metadata(content: dict[str, Any], chance: random.Random) -> Any:
    """Another value at, or somewhere below, a key beside the weights."""
    keys = [key for key in content if key != "model"]
    key = chance.choice([*keys, "config", "class_names", "group_norm_eps", "group_norm_groups", "input"])
    reported: Any = content
    while (
        isinstance(reported.get(key) if isinstance(reported, dict) else reported[key], dict | list)
        and chance.random() < 0.6
    ):
        inner = reported[key]
        if not inner:
            break
        reported = inner
        key = chance.choice(list(reported)) if isinstance(reported, dict) else chance.randrange(len(reported))
        if isinstance(reported, list) and not reported:
            break
    usual = reported.get(key) if isinstance(reported, dict) else reported[key]
    kind = chance.random()
    if kind < 0.1 and usual is not None:
        del reported[key]
    elif isinstance(usual, Tensor) and kind < 0.7:
        reported[key] = _other_tensor(usual, chance)
    elif isinstance(usual, str) and kind < 0.5:
        reported[key] = damage_text(usual.encode(), chance).decode("utf-8", "replace")
    else:
        reported[key] = chance.choice(
            [
                junk(chance),
                junk(chance),
                torch.zeros(3),
                -1,
                1e-3,
                {"backbone.bottom_up.stem.conv1.norm": -1.0},
            ]
        )
    return content


def _other_tensor(tensor: Tensor, chance: random.Random) -> Any:
    dense = tensor.detach().clone()
    return chance.choice(
        [
            lambda: dense.double(),
            lambda: dense.half(),
            lambda: dense.bfloat16(),
            lambda: dense.bool(),
            lambda: dense.long(),
            lambda: dense.to(torch.complex64),
            lambda: dense.float().to(torch.float8_e4m3fn),
            lambda: dense[..., None],
            lambda: dense.flatten(),
            lambda: dense.sum(),
            lambda: dense.new_zeros(0),
            lambda: torch.cat([dense.flatten(), dense.flatten()]),
            lambda: dense.new_zeros(1).expand(10**6, 10**6) if chance.random() < 0.5 else dense[None],
            lambda: torch.full_like(dense.float(), float("nan")),
            lambda: torch.full_like(dense.float(), 1e38),
            lambda: dense.float().to_sparse(),
            lambda: torch.quantize_per_tensor(dense.float(), 0.1, 0, torch.qint8),
            lambda: torch.empty(3, device="meta"),
            lambda: dense.float().numpy().tolist(),
            lambda: torch.nn.Parameter(dense.float()),
        ]
    )()


def _damage_tensors(content: dict[str, Any], chance: random.Random) -> Any:
    """Other names, shapes, types or numbers of tensors, and other places for the state dict."""
    state = content["model"]
    names = list(state)
    kind = chance.random()
    if kind < 0.1:
        return chance.choice(
            [
                state,
                {"state_dict": state},
                {"blobs": state},
                {"model": content},
                {"model": {}},
                [state],
                {},
                {"model": None},
                state[names[0]],
                {"model": [*state.values()]},
                {"model": state, "blobs": {}},
            ]
        )
    if kind < 0.25:
        prefix = chance.choice(["module.", "_orig_mod.", "model.", "backbone.", "\n", "", "x." * 100])
        content["model"] = {f"{prefix}{name}": value for name, value in state.items()}
        return content
    for name in chance.sample(names, chance.choice([1, 1, 3, len(names)])):
        value = state[name]
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        way = chance.random()
        if way < 0.15:
            del state[name]
        elif way < 0.3:
            state[
                chance.choice([name.upper(), f"{name}.x", "", "\x1b[2J\n", name[::-1], 7, None, (1, 2)])
            ] = state.pop(name)
        elif way < 0.4:
            state[name] = junk(chance)
        elif isinstance(value, Tensor):
            state[name] = _other_tensor(tensor, chance)
        else:
            types = ["<f8", ">f4", "<f2", "<i8", "?", "<U3", "<c8", "<M8[s]", "S2", "<u8"]
            state[name] = chance.choice(
                [np.zeros(np.shape(value), chance.choice(types)), value[None], np.zeros(0), value.T]
            )
    return content


def _damage_archive(data: bytes, chance: random.Random) -> bytes:
    """A zip with entries that PyTorch does not write."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    root = entries[0][0].partition("/")[0]
    way = chance.choice(
        ["more", "twice", "fewer", "packed", "renamed", "swapped", "many", "comment", "long", "roots"]
    )
    compression = zipfile.ZIP_DEFLATED if way == "packed" else zipfile.ZIP_STORED
    at = chance.randrange(len(entries))
    name, content = entries[at]
    if way == "more":
        odd = [
            "../x",
            "/etc/x",
            f"{root}/data/x",
            " ",
            f"{root}/code/x.py",
            f"{root}/constants.pkl",
            "é\n",
            f"{root}/data/0/",
            "x.npy",
        ]
        entries.insert(at, (chance.choice(odd), chance.randbytes(10)))
    elif way == "twice":
        entries.append((name, chance.choice([content, b"", chance.randbytes(len(content))])))
    elif way == "fewer":
        del entries[at]
    elif way == "renamed":
        entries[at] = (
            chance.choice([name.upper(), name + "x", f"{root}/data.pkl", f"{root}/version"]),
            content,
        )
    elif way == "swapped":
        other = chance.randrange(len(entries))
        entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], content)
    elif way == "many":
        entries += [(f"{root}/extra/{i}", b"") for i in range(70_000 if chance.random() < 0.3 else 3000)]
    elif way == "long":
        entries[at] = (name, content + bytes(chance.choice([1, 64, 10**6])))
    elif way == "roots":
        entries[at] = (name.replace(root, "other"), content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for entry, value in entries:
            archive.writestr(entry, value)
        if way == "comment":
            archive.comment = chance.choice([b"x" * 60_000, b"PK\x05\x06" + bytes(18)])
    return file.getvalue()
