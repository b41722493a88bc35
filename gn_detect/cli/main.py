"""Chooses the command and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from .. import __version__
from ..errors import UserError
from . import bench, convert, doctor, evaluate, plot, predict, replay, report, train, zoo

COMMANDS = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "convert": convert,
    "zoo": zoo,
    "plot": plot,
    "report": report,
    "bench": bench,
    "replay": replay,
    "doctor": doctor,
}
"""Each module has ``HELP``, ``add_arguments(parser)`` and ``run(args)``, which may return an exit status."""

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; ``sys.argv`` by default.

    Returns:
        0, or what the command returns; 2 after bad input, with one line on standard error; 130 after Ctrl-C.

    Raises:
        SystemExit: by argparse, for unknown flags (status 2) and ``--help`` (0).
    """
    args = parse(arguments)
    try:
        return COMMANDS[args.command].run(args) or 0
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of standard output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        return _fail(
            f"{(error.strerror or str(error)).lower()}:{name}; correct the path, its rights or make room"
        )
    except torch.cuda.OutOfMemoryError:
        return _fail("the GPU has too little memory; lower SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN")
    except KeyboardInterrupt:
        print("interrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; ``KEY VALUE`` pairs may also follow flags, which argparse alone refuses."""
    parser = make_parser()
    args, rest = parser.parse_known_args(arguments)
    if any(word.startswith("--") for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="gn-detect", description="Mask R-CNN with Group Normalization.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gn-detect {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
    return parser


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT
