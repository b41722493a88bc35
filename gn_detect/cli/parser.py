"""An argument parser whose errors are one line with the likely meaning, or the place to look."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from ..errors import Code, UserError

_ITERATIONS = "SOLVER.MAX_ITER, in iterations: epochs x images / SOLVER.IMS_PER_BATCH"
_SIZES = "INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST, the shorter side, and INPUT.MAX_SIZE_TRAIN and _TEST"
_DEVICE = "MODEL.DEVICE, which is cpu, cuda, cuda:1 or auto"
_NO_FLAG = "images are given without a flag"
_OUTPUT = ("--output", "OUTPUT_DIR")

# Flags of ultralytics, mmdetection, torchvision and others, with the first flag here that the command has, or
# the config key.
_HABITS: dict[str, tuple[str, ...]] = {
    "epochs epoch max-epochs num-epochs total-epochs": ("--epochs", _ITERATIONS),
    "max-time time-limit hours": ("--time",),
    "patience early-stop early-stopping": ("SOLVER.EARLY_STOP.PATIENCE, in evaluations",),
    "iters iterations max-iters num-iters steps max-steps num-steps": ("SOLVER.MAX_ITER",),
    "b batch batch-size bs train-batch-size images-per-batch samples-per-gpu": (
        "SOLVER.IMS_PER_BATCH, for all GPUs together; to evaluate TEST.IMS_PER_BATCH, for each",
    ),
    "lr learning-rate lr0 base-lr": ("SOLVER.BASE_LR",),
    "lrf min-lr": ("SOLVER.BASE_LR_END",),
    "wd weight-decay": ("SOLVER.WEIGHT_DECAY",),
    "optim optimizer opt": ("SOLVER.OPTIMIZER",),
    "scheduler lr-scheduler lr-schedule cos-lr": ("SOLVER.LR_SCHEDULER_NAME",),
    "lr-steps lr-step-size milestones": ("SOLVER.STEPS, in iterations",),
    "lr-gamma": ("SOLVER.GAMMA",),
    "warmup warmup-epochs warmup-iters warmup-steps": ("SOLVER.WARMUP_ITERS, in iterations",),
    "grad-clip clip-grad max-grad-norm clip-grad-norm": ("SOLVER.CLIP_GRADIENTS.ENABLED",),
    "accumulate accumulation-steps gradient-accumulation-steps grad-accum": ("SOLVER.ACCUMULATE",),
    "amp fp16 half bf16 mixed-precision": ("SOLVER.AMP.ENABLED True",),
    "ema model-ema": ("SOLVER.EMA.ENABLED True",),
    "sync-bn sync-batchnorm": ("MODEL.RESNETS.NORM SyncBN, and so for the other NORM keys",),
    "imgsz img-size image-size img-scale input-size size img": (_SIZES,),
    "min-size": ("INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST",),
    "max-size": ("INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST",),
    "j workers num-workers nw workers-per-gpu": ("--workers", "DATALOADER.NUM_WORKERS"),
    "device cuda cpu no-cuda gpu use-cpu": (_DEVICE,),
    "gpus num-gpu ngpus n-gpus gpu-num nproc-per-node nproc": ("--num-gpus", _DEVICE),
    "gpu-id gpu-ids": ("MODEL.DEVICE cuda:1, or the environment variable CUDA_VISIBLE_DEVICES",),
    "seed random-seed": ("SEED",),
    "o out output output-dir out-dir outdir save-dir work-dir project name exp log-dir logdir": _OUTPUT,
    "data data-path data-dir dataset data-root root": (
        "--data",
        "--train-json",
        "DATASETS.TRAIN and DATASETS.TEST, or DATASETS.REGISTER",
    ),
    "annotations ann ann-file annotation-file": ("--annotations", "--train-json"),
    "source input inputs image images img-dir": ("--train-images", _NO_FLAG),
    "cfg config": ("--config-file",),
    "cfg-options opts options opt-level set": ("SOLVER.BASE_LR 0.01, without a flag in front",),
    "pretrained checkpoint ckpt load-from weight pretrained-weights finetune": ("--weights", "MODEL.WEIGHTS"),
    "model": ("--weights", "MODEL.WEIGHTS"),
    "arch architecture encoder": ("--backbone", "MODEL.BACKBONE.MODEL"),
    "resume-from auto-resume": ("--resume", "MODEL.WEIGHTS"),
    "test-only evaluate eval val validate": ("--eval-only",),
    "classes num-classes nc": ("MODEL.ROI_HEADS.NUM_CLASSES",),
    "frozen-stages freeze-at trainable-backbone-layers": ("MODEL.BACKBONE.FREEZE_AT",),
    "freeze freeze-layers": ("MODEL.FREEZE or MODEL.BACKBONE.FREEZE_AT",),
    "conf conf-thres conf-thresh confidence confidence-threshold score-thr score-threshold score-thresh": (
        "--threshold",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    ),
    "iou iou-thres iou-thresh nms nms-thresh nms-thr": ("MODEL.ROI_HEADS.NMS_THRESH_TEST",),
    "max-det max-dets topk": ("TEST.DETECTIONS_PER_IMAGE",),
    "print-freq log-interval log-period": ("SOLVER.LOG_PERIOD, in iterations",),
    "save-period save-interval checkpoint-interval save-freq": ("SOLVER.CHECKPOINT_PERIOD, in iterations",),
    "eval-interval eval-freq eval-period val-interval": ("TEST.EVAL_PERIOD, in iterations",),
    "compile": ("MODEL.COMPILE True",),
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the lines of examples, and show the defaults of flags."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        known = isinstance(default, int | float | str) and not isinstance(default, bool)
        if not action.option_strings or not known or default == argparse.SUPPRESS or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Raise :class:`UserError` where argparse prints its usage and exits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        wrong = re.match("(.*invalid choice: '(.*?)') ", message)
        choices = [str(choice) for action in self._actions for choice in action.choices or ()]
        near = get_close_matches(wrong[2], choices, 1) if wrong else []
        if wrong and near:
            raise UserError(_code(message), f"{wrong[1]}; did you mean {near[0]}?")
        raise UserError(_code(message), f"{message}; {self.prog} --help shows how")


def _code(message: str) -> Code:
    if message.startswith("argument command: "):
        return "unknown-command"
    return "missing-argument" if re.search("required|expected .*argument", message) else "bad-argument"


def check_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse a flag that the command does not have, before argparse reports what it misses without it.

    Args:
        parser: the parser of all commands.
        words: the command line; after ``--`` no word is a flag.

    Raises:
        UserError: an unknown flag, or one in front of the command.
    """
    commands = next(dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    position = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    command = commands.get(words[position]) if position < len(words) else None
    for index, word in enumerate(words):
        flag = word.partition("=")[0]
        if word == "--" or (index > position and command is None):
            return
        scope = command if command is not None and index > position else parser
        if not re.match("--?[A-Za-z]", word) or flag in scope._option_string_actions:
            continue
        raise UserError("unknown-flag", f"unknown flag {flag}; {_meant(scope, flag)}")


def without_old_json(command: str, words: list[str]) -> list[str]:
    """Return the command line without ``--json FILE``, which ``doctor`` and ``bench`` took until 0.1.

    A word after ``--json`` is a FILE, except a mode or key of ``bench``. Remove this after version 0.2.
    """
    if command not in ("bench", "doctor"):
        return words
    instead = ["--output"] if command == "bench" else []
    kept: list[str] = []
    for word in words:
        for_bench = command == "bench" and (word in ("train", "infer", "norm") or word.isupper())
        if kept[-1:] == ["--json"] and command in kept and not word.startswith("-") and not for_bench:
            kept[-1:] = [*instead, word]
        elif word.startswith("--json="):
            kept += [*instead, word.removeprefix("--json=")]
        else:
            kept.append(word)
    if kept != words and "--quiet" not in words:
        advice = " ".join([*instead, "FILE"])
        print(f"warning: {command} --json FILE is deprecated; write {command} {advice}", file=sys.stderr)
    return kept


def _meant(scope: argparse.ArgumentParser, flag: str) -> str:
    """Return the remedy: a flag or key of the same meaning, a flag of a similar name, or where to look."""
    flags = [name for name in scope._option_string_actions if name.startswith("--") and name != "--help"]
    takes_keys = any(a.dest in ("overrides", "inputs") for a in scope._actions)
    near = [name for name in flags if name.startswith(flag) or flag.endswith(name[1:])]
    near = near or get_close_matches(flag, flags, 1, cutoff=0.7)
    habit = _habit(flag, flags)
    if habit.startswith("--"):
        return f"did you mean {habit}?"
    if habit == _NO_FLAG and any(a.dest == "inputs" for a in scope._actions):
        return f"{habit}; {scope.prog} --help shows how"
    keys = [habit] if habit and habit != _NO_FLAG else _keys_called(flag)
    if keys and takes_keys and (habit or not near):
        keys = [key if " " in key else f"{key} VALUE" for key in keys[:3]]
        return f"it is a config key, given after the command: {' or '.join(keys)}"
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    if any(isinstance(action, argparse._SubParsersAction) for action in scope._actions):
        return f"a command's own flags stand after its name; {scope.prog} --help shows how"
    return f"{scope.prog} --help lists them"


def check_keys(words: Sequence[str]) -> None:
    """Refuse ``KEY=VALUE``, and other tools' names of a key; the UserError has its name and form."""
    if not words:
        return
    from ..config.load import known_keys

    for word in words[::2]:
        key, equals, value = word.partition("=")
        is_key = key in known_keys() or ("." in key and key.upper() in known_keys())
        meant = key.upper() if is_key else key_of_habit(key)
        if equals and meant:
            raise UserError(
                "key-with-equals",
                f"{word}: key and value stand apart here, as in {meant.split(',')[0]} {value}",
            )
        if meant and not is_key:
            raise UserError("unknown-key", f"{key}: unknown key; its name here is {meant}")


def key_of_habit(name: str) -> str:
    """Return the config key, perhaps with a remark, that other tools call ``name``, or ""."""
    return _habit(name, ()).replace(_NO_FLAG, "")


def _habit(flag: str, flags: Sequence[str]) -> str:
    """Return the equivalent of another tool's flag: one of ``flags``, a config key with a remark, or ""."""
    name = re.sub("[_ ]", "-", flag.strip("-")).lower()
    answers = next((answers for names, answers in _HABITS.items() if name in names.split()), ())
    known = (answer for answer in answers if answer in flags or not answer.startswith("--"))
    return next(known, "")


def _keys_called(flag: str) -> list[str]:
    """Return the config keys whose last part is the flag's name."""
    from ..config.schema import is_below, known_keys, never_read

    name = flag.strip("-").replace("-", "_").upper()
    return [k for k in known_keys() if k.rpartition(".")[2] == name and not is_below(k, never_read())]
