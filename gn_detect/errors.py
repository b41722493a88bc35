"""The exception for mistakes that a user can make and correct, and the codes of all such mistakes."""

from __future__ import annotations

from typing import Literal

from .text import printable

# A code is one kind of mistake with one remedy. It stays when its messages are reworded: scripts, tests and
# docs/troubleshooting.md, which has the same order, refer to it.
Code = Literal[
    # command line
    "unknown-command",
    "unknown-flag",
    "missing-argument",
    "bad-argument",
    "extra-argument",
    "conflicting-flags",
    "lone-flag",
    "wrong-ending",
    "replaced-file",
    # config
    "no-config",
    "missing-config",
    "not-yaml",
    "not-a-config",
    "bad-base",
    "unknown-key",
    "key-with-equals",
    "missing-value",
    "bad-value",
    "unsupported-value",
    "conflicting-keys",
    "indivisible-batch",
    "not-a-pipeline",
    "refused-transform",
    # any file, and the machine
    "cannot-read",
    "cannot-write",
    "not-a-file",
    "oversized-file",
    "system-error",
    "missing-package",
    "no-gpu",
    "out-of-memory",
    "process-killed",
    "process-failed",
    # datasets
    "unknown-dataset",
    "no-dataset",
    "missing-annotations",
    "missing-images-folder",
    "not-json",
    "not-coco",
    "foreign-format",
    "no-objects",
    "classes-differ",
    "num-classes-differ",
    "no-such-image",
    "unlisted-image",
    "ambiguous-image",
    "not-results",
    "lossy-repair",
    "unknown-format",
    "damaged-labels",
    "rotated-box",
    # entries of a dataset: the doctor has the same kinds of faults
    "malformed",
    "empty-list",
    "fractions",
    "duplicate-category-id",
    "duplicate-image-id",
    "duplicate-annotation-id",
    "dangling-image",
    "dangling-category",
    "image-size",
    "missing-image",
    "misnamed-image",
    "image-outside",
    "unreadable-image",
    "size-differs",
    "bad-box",
    "box-outside",
    "box-empty",
    "bad-flag",
    "bad-area",
    "no-mask",
    "bad-polygon",
    "rle-size",
    "bad-rle",
    # weights
    "no-weights",
    "no-thresholds",
    "missing-weights",
    "unknown-weights",
    "download-failed",
    "upload-failed",
    "not-weights",
    "damaged-weights",
    "damaged-record",
    "newer-file",
    "unsafe-file",
    "not-finite",
    "unknown-network",
    "not-a-detector",
    "other-network",
    "other-norm",
    "other-groups",
    "other-convolution",
    "other-input",
    "unknown-backbone",
    "unfit-backbone",
    # conversion to GroupNorm
    "no-batchnorm",
    "unconvertible-norm",
    "unconvertible-model",
    "unknown-groups",
    "no-such-module",
    "calibration-images",
    # training and runs
    "folder-in-use",
    "deleted-folder",
    "no-run",
    "no-checkpoint",
    "other-run",
    "diverged",
    "cannot-compile",
    "cannot-capture",
    "not-a-run",
    "damaged-run-file",
    "no-metrics",
    # exported detectors
    "cannot-export",
    "not-exported",
    "untrusted-program",
    "thin-image",
]


class UserError(Exception):
    """Bad input that a user can correct: a file, key, image or value.

    The command line prints it as ``error: MESSAGE [CODE]`` and exits with status 2.

    Attributes:
        code: the kind of mistake, for scripts and tests; docs/troubleshooting.md explains it.

    Args:
        message: one line that names the item and the remedy. Control characters become escapes.
    """

    def __init__(self, code: Code, message: object) -> None:
        super().__init__(code, printable(message))  # both, for a copy in another process
        self.code = code

    def __str__(self) -> str:
        """Return the message alone."""
        return str(self.args[1])

    @property
    def line(self) -> str:
        """Return the message with the code, as the command line prints it."""
        return f"{self} [{self.code}]"


class Diverged(UserError):
    """The losses or weights of a training are no longer finite."""
