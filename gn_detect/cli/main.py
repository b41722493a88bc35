"""Chooses the command and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from PIL import Image

from .. import __version__
from ..errors import UserError
from ..evaluation.model import LESS_MEMORY
from ..files import remedy
from ..text import printable
from . import (
    bench,
    calibrate,
    completion,
    config,
    convert,
    doctor,
    evaluate,
    export,
    plot,
    predict,
    replay,
    report,
    train,
    zoo,
)
from .inputs import names_weights
from .output import Result, add_output_arguments, directed, print_json, printable_output
from .parser import HelpFormatter, Parser, check_flags, check_keys

COMMANDS = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "convert": convert,
    "calibrate": calibrate,
    "config": config,
    "export": export,
    "zoo": zoo,
    "plot": plot,
    "report": report,
    "bench": bench,
    "replay": replay,
    "doctor": doctor,
    "completion": completion,
}
"""Each module has ``HELP``, ``add_arguments(parser)`` and ``run(args)``, which may return an exit status or a
:class:`Result`; ``EXAMPLES``, lines of commands, stands below its ``--help``."""

BAD_INPUT, INTERRUPTED = 2, 130

EXIT_STATUS = """exit status:
  0    done
  1    doctor --strict: there are errors or warnings; predict: an input could not be read, the others are
       done; export --check: the file's detections are out of the tolerances
  2    bad input, or a training diverged: one line on standard error says what, and what to do
  130  interrupted by Ctrl-C; 143 by SIGTERM (train has saved a checkpoint; --resume continues)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; ``sys.argv`` by default.

    Returns:
        0, or what the command returns; 2 after bad input, with one line on standard error; 130 after Ctrl-C.
        With ``--json`` the result stands on standard output, alone.

    Raises:
        SystemExit: for ``--help`` (and without arguments) and ``--version`` with status 0, and by a training
            that is told to stop.
    """
    try:
        args = parse(arguments)
    except UserError as error:
        return _fail(str(error))
    try:
        with printable_output(), directed(args.quiet, args.as_json), warnings.catch_warnings():
            # Of images that are half as large as those that Pillow refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            outcome = COMMANDS[args.command].run(args)
        if not isinstance(outcome, Result):
            return outcome or 0
        if args.as_json:
            print_json(outcome.value)
        return outcome.status
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of standard output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        return _fail(f"{(error.strerror or str(error)).lower()}{name}; {remedy(error)}")
    except torch.cuda.OutOfMemoryError:
        return _fail(f"out of GPU memory; {_less_memory(args)}")
    except KeyboardInterrupt:
        hint = "; --resume continues from the last checkpoint" if _trains(args) else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; flags may part ``KEY VALUE`` pairs or inputs, which argparse alone refuses.

    Raises:
        UserError: a command, flag or value that there is not, a word too many, or one that is missing.
    """
    parser = make_parser()
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    check_flags(parser, words)
    args, rest = parser.parse_known_args(words)
    rest = [word for word in rest if word != "--"]
    lists = [name for name in ("overrides", "inputs", "runs", "names") if hasattr(args, name)]
    if rest and not lists:
        raise UserError(f"{rest[0]!r} is a word too many; gn-detect {args.command} --help shows how")
    if rest:
        getattr(args, lists[0]).extend(rest)
    if not (args.command == "config" and args.overrides[:1] == ["explain"]):
        keys = getattr(args, "overrides", [])
        has_checkpoint = args.command in ("eval", "export") and keys and names_weights(keys[0])
        check_keys(keys[1:] if has_checkpoint else keys)
    return args


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="gn-detect",
        description="Mask R-CNN with Group Normalization.",
        epilog=f"gn-detect <command> --help has examples.\n\n{EXIT_STATUS}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_output_arguments(parser, default=False)
    parser.add_argument("--version", action="version", version=f"gn-detect {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=_epilog(module),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        add_output_arguments(command)
    return parser


def _epilog(module: ModuleType) -> str:
    lines = getattr(module, "EXAMPLES", "").strip().splitlines()
    examples = "".join(f"  {line}\n" for line in lines)
    return f"examples:\n{examples}\n{EXIT_STATUS}" if examples else EXIT_STATUS


def _trains(args: argparse.Namespace) -> bool:
    return args.command == "train" and not args.eval_only


def _less_memory(args: argparse.Namespace) -> str:
    """What to do where the memory of the GPU is too small for the command."""
    if args.command == "bench":
        return "lower --images, --size or --objects"
    if _trains(args):
        return (
            "lower INPUT.MAX_SIZE_TRAIN and INPUT.MIN_SIZE_TRAIN, or set SOLVER.ACCUMULATE to each GPU's "
            "images: they go through the model one by one then"
        )
    return LESS_MEMORY


def _fail(message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return BAD_INPUT
