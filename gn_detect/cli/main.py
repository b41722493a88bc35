"""Choose the command; turn errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

from .. import __version__
from ..errors import UserError
from ..files import remedy
from .output import Result, add_output_arguments, directed, print_json, printable_output
from .parser import Parser, check_flags, check_keys, without_old_json

COMMANDS = {
    "train": "Train a model and evaluate it. Without --config-file, one is made for the data.",
    "eval": "Evaluate a checkpoint on DATASETS.TEST.",
    "predict": "Find objects in images and videos with a trained checkpoint.",
    "convert": "Convert a checkpoint from BatchNorm to GroupNorm.",
    "calibrate": "Bring a converted checkpoint closer to its original, with images that need no labels.",
    "config": "Print the config that a file and KEY VALUE pairs make, or explain a key or find it by words.",
    "export": "Export a trained detector as ONNX, program of PyTorch or safetensors, or push it to the Hub.",
    "zoo": "List, explain, download and check published weights.",
    "plot": "Draw losses, AP and learning rate of one run, or of several in the same axes.",
    "compare": "Tell whether the AP of two runs, or of two groups of seeds, differs by more than luck.",
    "report": "Write a run's numbers, curves, mistakes and pictures as one HTML page that needs no network.",
    "import": "Convert YOLO, Pascal VOC, labelme, CVAT, VIA, Label Studio or masks to COCO, and split it.",
    "bench": "Time a training step or a detection part by part, or each norm and PyTorch's.",
    "replay": "Repeat a training step whose loss or gradient was not finite, from its black box.",
    "doctor": "Find errors in a dataset before training does.",
    "completion": "Print a script with which bash, zsh or fish complete commands and flags.",
}

BAD_INPUT, INTERRUPTED = 2, 130

EXIT_STATUS = """exit status:
  0    done
  1    doctor --strict: there are errors or warnings; predict: an input could not be read, the others are
       done; export --check: the file's detections are out of the tolerances
  2    bad input, or a training diverged: one line on standard error says what, and what to do
  130  interrupted by Ctrl-C; 143 by SIGTERM (train has saved a checkpoint; --resume continues)"""


_MODULES = {"eval": "evaluate", "import": "import_data"}  # names that Python has for itself


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; ``sys.argv`` by default.

    Returns:
        0, or the command's own status; 2 after bad input, with one line on standard error; 130 after Ctrl-C.
        With ``--json`` the result stands on standard output, alone.

    Raises:
        SystemExit: for ``--help`` (and without arguments) and ``--version`` with status 0, and by a training
            that receives SIGTERM.
    """
    try:
        args = parse(arguments)
    except UserError as error:
        return _fail(error)
    try:
        with printable_output(), directed(args.quiet, args.as_json), warnings.catch_warnings():
            # Pillow warns of images half as large as those that it refuses.
            warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
            outcome = load_command(args.command).run(args)
        if not isinstance(outcome, Result):
            return outcome or 0
        if args.as_json:
            print_json(outcome.value)
        return outcome.status
    except UserError as error:
        return _fail(error)
    except BrokenPipeError:  # the reader of standard output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        message = f"{(error.strerror or str(error)).lower()}{name}; {remedy(error)}"
        return _fail(UserError("system-error", message))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is not imported here
            raise
        return _fail(UserError("out-of-memory", f"out of GPU memory; {_less_memory(args)}"))
    except KeyboardInterrupt:
        hint = "; --resume continues from the last checkpoint" if _trains(args) else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line. Flags may stand among ``KEY VALUE`` pairs or inputs.

    Raises:
        UserError: an unknown command, flag or value, a word too many, or a missing one.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = next((word for word in words if not word.startswith("-")), "")
    parser = make_parser({command} & COMMANDS.keys())
    words = without_old_json(command, words)
    check_flags(parser, words)
    args, rest = parser.parse_known_args(words)
    rest = [word for word in rest if word != "--"]
    lists = [name for name in ("overrides", "inputs", "runs", "names", "files") if hasattr(args, name)]
    if rest and not lists:
        raise UserError(
            "extra-argument", f"{rest[0]!r} is a word too many; gn-detect {args.command} --help shows how"
        )
    if rest:
        getattr(args, lists[0]).extend(rest)
    if not (args.command == "config" and args.overrides[:1] == ["explain"]):
        keys = getattr(args, "overrides", [])
        if args.command in ("eval", "export") and keys:
            from .inputs import names_weights

            keys = keys[1:] if names_weights(keys[0]) else keys
        check_keys(keys)
    return args


def load_command(name: str) -> ModuleType:
    """Import the module of a command.

    It has ``add_arguments(parser)``, ``EXAMPLES``, lines for ``--help``, and ``run(args)``, which may return
    an exit status or a :class:`Result`.
    """
    return import_module(f".{_MODULES.get(name, name)}", __package__)


def make_parser(commands: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser of all commands, with the flags of ``commands``, whose modules are imported."""
    parser = Parser(
        prog="gn-detect",
        description="Mask R-CNN with Group Normalization.",
        epilog=f"gn-detect <command> --help has examples.\n\n{EXIT_STATUS}",
    )
    add_output_arguments(parser, default=False)
    parser.add_argument("--version", action="version", version=f"gn-detect {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text)
        if name in commands:
            module = load_command(name)
            examples = "".join(f"  {line}\n" for line in module.EXAMPLES.strip().splitlines())
            command.epilog = f"examples:\n{examples}\n{EXIT_STATUS}"
            module.add_arguments(command)
            add_output_arguments(command)
    return parser


def _trains(args: argparse.Namespace) -> bool:
    return args.command == "train" and not args.eval_only


def _less_memory(args: argparse.Namespace) -> str:
    """Return the remedy where the memory of the GPU is too small for the command."""
    if args.command == "bench":
        return "lower --images, --size or --objects"
    if _trains(args):
        return (
            "lower INPUT.MAX_SIZE_TRAIN and INPUT.MIN_SIZE_TRAIN, or set SOLVER.ACCUMULATE to each GPU's "
            "images: they go through the model one by one then"
        )
    from ..evaluation.model import LESS_MEMORY

    return LESS_MEMORY


def _fail(error: UserError) -> int:
    print(f"error: {error.line}", file=sys.stderr)
    return BAD_INPUT
