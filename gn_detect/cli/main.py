"""Chooses the command and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import NoReturn

import torch
from PIL import Image

from .. import __version__
from ..errors import UserError
from ..evaluation.model import LESS_MEMORY
from ..files import remedy
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
from .output import Result, add_output_arguments, directed, print_json

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
  2    bad input: one line on standard error says what, and what to do
  130  interrupted by Ctrl-C; 143 by SIGTERM (train has saved a checkpoint; --resume continues)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; ``sys.argv`` by default.

    Returns:
        0, or what the command returns; 2 after bad input, with one line on standard error; 130 after Ctrl-C.
        With ``--json`` the result stands on standard output, alone.

    Raises:
        SystemExit: by argparse, for ``--help`` and ``--version`` (status 0).
    """
    try:
        args = parse(arguments)
    except UserError as error:
        return _fail(str(error))
    try:
        with directed(args.quiet, args.as_json), warnings.catch_warnings():
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
        hint = "; --resume continues from the last checkpoint" if args.command == "train" else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; flags may part ``KEY VALUE`` pairs or inputs, which argparse alone refuses.

    Raises:
        UserError: an unknown command or flag, a word too many, or one that is missing.
    """
    parser = make_parser()
    args, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if re.match("--?[A-Za-z]", word)]
    lists = [name for name in ("overrides", "inputs", "runs") if hasattr(args, name)]
    if unknown:
        raise UserError(f"unknown flag {unknown[0]}; {_near_flag(parser, args.command, unknown[0])}")
    if rest and not lists:
        raise UserError(
            f"{rest[0]!r} is a word too many; gn-detect {args.command} --help shows what there is"
        )
    if rest:
        getattr(args, lists[0]).extend(rest)
    return args


def _near_flag(parser: argparse.ArgumentParser, command: str, flag: str) -> str:
    """What may have been meant; other tools' names are often longer: ``--confidence-threshold``."""
    commands = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    near = get_close_matches(flag.partition("=")[0], commands[command]._option_string_actions, 1)
    return f"did you mean {near[0]}?" if near else f"gn-detect {command} --help lists them"


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        wrong = re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message)
        near = get_close_matches(wrong[2], re.findall(r"[\w-]+", wrong[3]), 1) if wrong else []
        if wrong and near:
            raise UserError(f"{wrong[1]}; did you mean {near[0]}?")
        raise UserError(f"{message}; {self.prog} --help shows how")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="gn-detect",
        description="Mask R-CNN with Group Normalization.",
        epilog=f"gn-detect <command> --help has examples.\n\n{EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        add_output_arguments(command)
    return parser


def _epilog(module: ModuleType) -> str:
    lines = getattr(module, "EXAMPLES", "").strip().splitlines()
    examples = "".join(f"  {line}\n" for line in lines)
    return f"examples:\n{examples}\n{EXIT_STATUS}" if examples else EXIT_STATUS


def _less_memory(args: argparse.Namespace) -> str:
    """What to do where the memory of the GPU is too small for the command."""
    if args.command == "bench":
        return "lower --images, --size or --objects"
    if args.command == "train" and not args.eval_only:
        return "lower SOLVER.IMS_PER_BATCH, or INPUT.MAX_SIZE_TRAIN and INPUT.MIN_SIZE_TRAIN"
    return LESS_MEMORY


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT
