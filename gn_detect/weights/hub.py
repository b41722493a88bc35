"""Weights on the Hugging Face Hub: ``hf://USER/REPO`` is pulled at one commit, and pushed as one commit."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..config import dump_config
from ..config.shared import read_shared
from ..config.yaml_text import parse_yaml
from ..errors import Code, UserError
from ..files import atomic_write_text, read_text, remedy
from ..progress import HIDDEN
from ..text import shortened
from .download import verify
from .metadata import CheckpointMetadata, program_version, read_metadata, signature
from .zoo import cache_folder

HUB = "hf://"
HOST = "huggingface.co"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LIBRARY = "gn_detect"  # the card's and the config's library_name
MOST_BYTES = {CONFIG: 1 << 20, WEIGHTS: 1 << 32}  # the files that are pulled, in this order
TIMEOUT = 10.0  # seconds without an answer

_NAME = re.compile(r"hf:/+([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt", ".pickle")
_LISTED = 5  # names in a message
_LOG_IN = "log in with hf auth login, or set HF_TOKEN"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubName:
    """A repository and a branch, tag or commit of it."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{HUB}{self.repo}@{self.revision}"

    @property
    def is_commit(self) -> bool:
        """Return whether the revision is a whole commit hash, which always means the same files."""
        return _COMMIT.fullmatch(self.revision) is not None


def is_hub(path: str | Path) -> bool:
    """Return whether ``path`` names a repository on the Hub."""
    return re.match(r"hf:/", str(path)) is not None


def read_name(path: str | Path) -> HubName:
    """Return the parts of ``hf://USER/REPO``, which means the branch main, or ``hf://USER/REPO@REVISION``.

    Raises:
        UserError: it has another form.
    """
    found = _NAME.fullmatch(str(path))
    if found is None or ".." in str(path) or "//" in (found[2] or "") or str(path).endswith("/"):
        raise UserError("unknown-weights", f"{path} is no name on the Hub: write hf://USER/REPO@REVISION")
    return HubName(found[1], found[2] or "main")


def pinned(path: str) -> str:
    """Return ``hf://USER/REPO@COMMIT`` for a name on the Hub, pulled; another ``path`` stays as it is.

    Raises:
        UserError: see :func:`pull`.
    """
    return str(pull(path)[1]) if is_hub(path) else path


def pull(path: str | Path) -> tuple[Path, HubName]:
    """Return the ``model.safetensors`` of a repository in the cache, and its name with the commit.

    Beside it lies the ``config.json`` of the same commit, if the repository has one; no other file is pulled.
    Sizes are compared with :data:`MOST_BYTES` before, and size and sha256 with the Hub's after a download. A
    commit that is in the cache needs no network; neither does a branch if the Hub cannot be reached.

    Raises:
        UserError: huggingface_hub is missing, there is no such repository or revision, it has no
            ``model.safetensors``, a file is too large, or the Hub does not answer.
    """
    name = read_name(path)
    hub = _hub_for(name)
    folder = cache_folder() / HOST

    def in_cache() -> tuple[Path, HubName] | None:
        found = hub.try_to_load_from_cache(name.repo, WEIGHTS, cache_dir=folder, revision=name.revision)
        file = Path(found) if isinstance(found, str) else None
        return None if file is None else (file, replace(name, revision=file.parent.name))

    known = in_cache()
    if name.is_commit and known is not None:
        return known
    api = hub.HfApi(library_name=LIBRARY, library_version=program_version())
    try:
        with _asking("download-failed", f"cannot take {name} from the Hub"):
            info = api.model_info(name.repo, revision=name.revision, timeout=TIMEOUT, files_metadata=True)
        files = _checked(name, info)
        for file, (size, checksum) in files.items():
            with _asking("download-failed", f"cannot take {file} of {name} from the Hub"):
                target = Path(
                    api.hf_hub_download(
                        name.repo, file, revision=info.sha, cache_dir=folder, etag_timeout=TIMEOUT
                    )
                )
            try:
                verify(target, size=size, checksum=checksum)
            except UserError:
                target.resolve().unlink()
                target.unlink(missing_ok=True)
                raise
    except UserError as error:
        if error.code != "download-failed" or known is None:
            raise
        logger.warning("%s; %s, which was pulled before, is used", error, known[1])
        return known
    if not name.is_commit:  # for a later call without a network
        with suppress(UserError):
            atomic_write_text(target.parents[2] / "refs" / name.revision, info.sha)
    return target, replace(name, revision=info.sha)


def push(path: str, files: Mapping[str, Path]) -> tuple[HubName, str]:
    """Write files into a repository as one commit, and return its name and URL.

    A repository that does not exist is made, private. The token is that of huggingface_hub: ``HF_TOKEN``, or
    that of ``hf auth login``.

    Args:
        path: ``hf://USER/REPO``, or with ``@BRANCH``.
        files: by their names in the repository.

    Raises:
        UserError: huggingface_hub is missing, or the Hub does not take the files.
    """
    name = read_name(path)
    hub = _hub_for(name)
    api = hub.HfApi(library_name=LIBRARY, library_version=program_version())
    operations = [hub.CommitOperationAdd(file, source) for file, source in files.items()]
    with _asking("upload-failed", f"cannot push to {name}"):
        api.create_repo(name.repo, private=True, exist_ok=True)
        message = f"Upload by {LIBRARY} {program_version()}"
        commit = api.create_commit(name.repo, operations, commit_message=message, revision=name.revision)
    return replace(name, revision=str(commit.oid)), str(commit.commit_url)


def shared_record(metadata: CheckpointMetadata, file: Path, name: HubName) -> CheckpointMetadata:
    """Return the record of pulled weights, with the shared keys alone of their config.

    Config and classes are those of a ``config.json`` of ours, otherwise those in the header of the weights.

    Args:
        metadata: of the header.
        file: the ``config.json``, which may be missing, or of another library.
        name: for messages.

    Raises:
        UserError: an entry is of another type, or a shared key of the config does not fit.
    """
    source = f"{CONFIG} of {name}"
    try:
        content = json.loads(read_text(file, MOST_BYTES[CONFIG])) if file.is_file() else {}
        if not isinstance(content, dict) or content.get("library_name") != LIBRARY:
            content = {}
        if entries := {key: content[key] for key in _RECORD if key in content}:
            found = read_metadata(entries | signature(), source)
            metadata = replace(metadata, **{key: getattr(found, key) for key in entries})
        values = content.get("config")
        if values is None:
            source, values = f"the config in {WEIGHTS} of {name}", parse_yaml(metadata.config or "")
        config = None
        if isinstance(values, dict):
            config = dump_config(read_shared(values, source))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            "damaged-record", f"{source} cannot be read: {_first_line(error)}; its owner has to push it again"
        ) from error
    return replace(metadata, config=config)


_RECORD = ("class_names", "category_ids", "score_thresholds", "results")  # entries of a config.json


def config_json(architecture: str, metadata: CheckpointMetadata, config: Mapping[str, Any]) -> str:
    """Return the ``config.json`` for pushed weights; :func:`shared_record` reads it."""
    content = {
        "library_name": LIBRARY,
        "library_version": program_version(),
        "architecture": architecture,
        **{key: getattr(metadata, key) for key in _RECORD},
        "config": config,
    }
    return json.dumps(content, indent=2) + "\n"


def _checked(name: HubName, info: Any) -> dict[str, tuple[int, str]]:
    """Return sizes and checksums of the files to pull.

    Raises:
        UserError: there are no weights that may be read, or a file is too large.
    """
    listed = {each.rfilename: each for each in info.siblings or []}
    if WEIGHTS not in listed:
        if pickles := [file for file in listed if file.endswith(_PICKLES)]:
            raise UserError(
                "unsafe-file",
                f"refused to pull {name}: it has no {WEIGHTS}, and pickles ({_some(pickles)}) are not taken "
                f"from the Hub; ask its owner for {WEIGHTS}",
            )
        raise UserError(
            "missing-weights",
            f"{name} has no {WEIGHTS}, the only file of weights that is pulled; it has "
            f"{_some(list(listed)) or 'nothing'}",
        )
    files = {}
    for file, most in MOST_BYTES.items():
        if file not in listed:
            continue
        size, lfs = listed[file].size, listed[file].lfs
        if size is None:
            raise UserError("download-failed", f"cannot take {file} of {name}: the Hub does not say its size")
        if size > most:
            raise UserError(
                "oversized-file",
                f"{file} of {name} has {size} bytes, and at most {most} are pulled; nothing was downloaded",
            )
        files[file] = size, f"sha256:{lfs.sha256}" if lfs is not None and lfs.sha256 else ""
    return files


def _hub_for(name: HubName) -> Any:
    """Return the module ``huggingface_hub``, which takes the name.

    Raises:
        UserError: it is not installed, or refuses the name.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise UserError(
            "missing-package",
            f"{name} needs huggingface_hub, which is not installed: pip install huggingface_hub",
        ) from error
    try:
        validate_repo_id(name.repo)
    except ValueError as error:
        raise UserError("unknown-weights", f"{name} is no name on the Hub: {_first_line(error)}") from error
    return huggingface_hub


@contextmanager
def _asking(code: Code, what: str) -> Iterator[None]:
    """Call huggingface_hub without its own messages; its errors become one line."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    theirs = logging.getLogger("huggingface_hub")
    unseen = HIDDEN in os.environ or not sys.stderr.isatty()
    level, hide = theirs.level, unseen and not are_progress_bars_disabled()
    theirs.setLevel(logging.ERROR)
    if hide:
        disable_progress_bars()
    try:
        yield
    except Exception as error:  # those of its HTTP library, too, which differs between its versions
        raise _refusal(code, what, error) from error
    finally:
        theirs.setLevel(level)
        if hide:
            enable_progress_bars()


def _refusal(code: Code, what: str, error: Exception) -> UserError:
    from huggingface_hub import errors

    answer = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        reason = f"its owner gives access on request; ask for it on its page, then {_LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        code = "unknown-weights" if code == "download-failed" else code
        reason = "it has no such branch, tag or commit; see the list on its page"
    elif isinstance(error, errors.RepositoryNotFoundError) or answer == 404:
        code = "unknown-weights" if code == "download-failed" else code
        reason = f"there is no such model, or it is private; check the name, or {_LOG_IN}"
    elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        reason = "HF_HUB_OFFLINE is set, and it is not in GN_DETECT_CACHE; unset it once, with a network"
    elif answer in (401, 403):
        reason = f"the Hub answers {answer}: the token is missing, wrong or without this right; {_LOG_IN}"
    elif answer is not None:
        reason = f"the Hub answers {answer}; try again later"
    elif isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror.lower()}: {error.filename}; {remedy(error)}"
    elif "Timeout" in type(error).__name__:
        reason = "the Hub does not answer in time; try again, or check HTTPS_PROXY and HF_ENDPOINT"
    elif "Connect" in type(error).__name__:
        reason = "the Hub cannot be reached; check the network, HTTPS_PROXY and HF_ENDPOINT"
    else:
        reason = f"{_first_line(error)}; try again"
    return UserError(code, f"{what}: {reason}")


def _first_line(error: BaseException) -> str:
    return shortened(next(iter(str(error).strip().splitlines()), type(error).__name__), 200)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shortened(name) for name in names[:_LISTED]) + more
