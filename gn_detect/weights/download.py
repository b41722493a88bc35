"""Files over https: resumed, checked, and in place only when they are whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_write_text, cannot_write
from ..text import printable

ATTEMPTS = 5
"""Connections that may fail one after the other without a byte more."""

TIMEOUT = 30.0
"""Seconds without a byte."""

BACK_OFF = 1.0
"""Seconds before the second attempt; twice as long before each further one."""

LONGEST_WAIT = 60.0
"""Seconds between two attempts, whatever the server asks for."""

MD5_BESIDE = "md5-url"
"""In place of a checksum: the publisher has it in a file with ``.md5`` behind the URL."""

_CHUNK = 1 << 20
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


class _Retry(Exception):
    """The connection failed in a way that another attempt may mend, after ``wait`` seconds at least."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _Final(Exception):
    """No attempt will help."""


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise _Final(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, target: Path, *, size: int | None = None, checksum: str = "") -> Path:
    """Fetch ``url`` into ``target``.

    What was received before a break stays beside the target as ``.part`` and is continued, also by a later
    call. A second process waits for the first and finds the file. Proxies and certificates are those of the
    environment (``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``).

    Args:
        url: https.
        target: file to write; its folder is made.
        size: in bytes, if it is known.
        checksum: ``"sha256:<digits>"`` or ``"md5:<digits>"``, all or the first; :data:`MD5_BESIDE`, which is
            then kept as ``<target>.md5``; ``""`` if there is none.

    Raises:
        UserError: the file could not be fetched, or is not what was published. The message says where to put
            it by hand.
    """
    part = _beside(target, ".part")
    try:
        if urlsplit(url).scheme != "https":
            raise _Final("it is not https")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if target.is_file():  # another process was faster
                return target
            opener = urllib.request.build_opener(_OnlyHttps())
            if checksum == MD5_BESIDE:
                checksum = _retrying(lambda: _published(opener, url))
            _fetch(opener, url, part, size)
            _check(part, size, checksum)
            if checksum.startswith("md5:"):
                atomic_write_text(_beside(target, ".md5"), checksum.removeprefix("md5:") + "\n")
            os.replace(part, target)
            _tag(part).unlink(missing_ok=True)
    except (_Final, _Retry) as error:
        raise UserError(
            f"cannot download {url}: {error}; fetch it by other means and put it at {target}"
        ) from error
    except OSError as error:
        raise cannot_write(target, error, "; GN_DETECT_CACHE names the folder") from error
    return target


def verify(file: Path, *, size: int | None = None, checksum: str = "") -> str:
    """Compare a file with what was published, and say what was compared.

    Raises:
        UserError: another size or checksum.
    """
    found = file.stat().st_size
    if size is not None and found != size:
        raise UserError(f"{file} has {found} bytes, and {size} were published; remove and download it again")
    if checksum == MD5_BESIDE:
        beside = _beside(file, ".md5")
        checksum = f"md5:{beside.read_text(encoding='ascii').strip()}" if beside.is_file() else ""
        if not checksum:
            return f"{found} bytes; its checksum was not downloaded"
    kind, _, wanted = checksum.partition(":")
    if not wanted:
        return f"{found} bytes; no checksum is published"
    digest = hashlib.new(kind, usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(wanted):
        raise UserError(
            f"{file} has {kind} {digest.hexdigest()}, and {wanted} was published: it is damaged or was "
            "replaced; remove and download it again"
        )
    return f"{found} bytes, {kind} {wanted} as published"


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.name + ending)


def _tag(part: Path) -> Path:
    """Holds what tells the server's file from a later one: its ETag or its date."""
    return _beside(part, ".tag")


def _check(part: Path, size: int | None, checksum: str) -> None:
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
    try:
        verify(part, size=size, checksum=checksum)
    except UserError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = FileLock(_beside(target, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that downloads {printable(target.name)}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _published(opener: urllib.request.OpenerDirector, url: str) -> str:
    """The content of ``url.md5``; "" where the server has none."""
    try:
        with _open(opener, urllib.request.Request(f"{url}.md5")) as response:
            text = response.read(200).decode("ascii", "replace").split()
    except urllib.error.HTTPError as error:
        if error.code in (403, 404):
            return ""
        raise _of_status(error) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(_reason(error)) from error
    digits = text[0].lower() if text else ""
    if not re.fullmatch(r"[0-9a-f]{32}", digits):
        raise _Final(f"{url}.md5 holds no checksum")
    return f"md5:{digits}"


def _open(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> Any:
    """The response.

    Raises:
        urllib.error.HTTPError: of the server.
    """
    request.add_header("User-Agent", "gn_detect")
    request.add_header("Accept-Encoding", "identity")
    try:
        return opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        hopeless = isinstance(reason, ssl.SSLCertVerificationError | socket.gaierror)
        raise (_Final if hopeless else _Retry)(_reason(error)) from error


def _of_status(error: urllib.error.HTTPError) -> _Retry | _Final:
    message = f"the server answers {error.code} {' '.join(str(error.reason).split())}"
    if error.code not in _TEMPORARY:
        return _Final(message)
    wait = error.headers.get("Retry-After", "") if error.headers else ""
    return _Retry(message, float(wait) if wait.isdigit() else 0.0)


def _retrying(attempt: Any, progress: Any = lambda: 0) -> Any:
    """``attempt()``, again after a while as long as it gets further or has failed a few times only."""
    failures, wait = 0, BACK_OFF
    while True:
        before = progress()
        try:
            return attempt()
        except _Retry as error:
            failures, wait = (failures + 1, wait * 2) if progress() <= before else (1, BACK_OFF)
            if failures >= ATTEMPTS:
                raise _Retry(f"{error} ({ATTEMPTS} attempts)") from error
            pause = min(max(wait, error.wait), LONGEST_WAIT)
            print(f"{printable(error)}; trying again in {pause:g} seconds", file=sys.stderr)
            time.sleep(pause)


def _fetch(opener: urllib.request.OpenerDirector, url: str, part: Path, size: int | None) -> None:
    """Until ``part`` is whole; every attempt goes on where the last one stopped."""
    _retrying(lambda: _attempt(opener, url, part, size), lambda: _length(part))


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _attempt(opener: urllib.request.OpenerDirector, url: str, part: Path, size: int | None) -> None:
    start, request = _length(part), urllib.request.Request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if _tag(part).is_file():
            request.add_header("If-Range", _tag(part).read_text(encoding="latin1"))
    try:
        response = _open(opener, request)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise _of_status(error) from error
        # Nothing lies behind what is here: it is whole, or of another file.
        theirs = str(error.headers.get("Content-Range", "")).rpartition("/")[2]
        if str(start) in (theirs, str(size)):
            return
        part.unlink()
        raise _Retry("the server's file is shorter than what was received before") from error
    with response:
        resumed = response.status == 206
        if resumed and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            part.unlink()
            raise _Retry("the server sends another part than was asked for")
        if response.headers.get_content_type() == "text/html":
            raise _Final("the server sends a web page instead of the file")
        if not resumed:
            start = 0
            _keep_tag(part, response)
        told = response.headers.get("Content-Length", "")
        total = start + int(told) if told.isdigit() else None
        _check_room(part, total, size, start)
        with part.open("ab" if resumed else "wb") as file:
            _receive(response, file, part.name.removesuffix(".part"), start, total, size)


def _keep_tag(part: Path, response: Any) -> None:
    tag = response.headers.get("ETag", "")
    tag = response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    if tag:
        _tag(part).write_text(tag, encoding="latin1")
    else:
        _tag(part).unlink(missing_ok=True)


def _check_room(part: Path, total: int | None, size: int | None, start: int) -> None:
    if size is not None and total is not None and total != size:
        raise _Final(f"the server's file has {total} bytes, and {size} were published")
    needed, free = (total or 0) - start, shutil.disk_usage(part.parent).free
    if needed > free:
        raise _Final(f"it needs {needed} bytes, and {part.parent} has {free}; make room")


def _receive(
    response: Any, file: IO[bytes], name: str, start: int, total: int | None, size: int | None
) -> None:
    limit = size if size is not None else total
    # disable=None: no bar where standard error is not a terminal
    with tqdm(
        total=total, initial=start, desc=printable(name), unit="B", unit_scale=True, disable=None
    ) as bar:
        received = start
        while True:
            try:
                chunk = response.read1(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Retry(_reason(error)) from error
            if not chunk:
                break
            received += len(chunk)
            if limit is not None and received > limit:
                raise _Final(f"the server sends more than {limit} bytes")
            file.write(chunk)
            bar.update(len(chunk))
    wanted = total if total is not None else size
    if wanted is not None and received < wanted:
        raise _Retry(f"the connection ended after {received} of {wanted} bytes")


def _reason(error: BaseException) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"nothing came for {TIMEOUT:g} seconds"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted ({reason.verify_message})"
    if isinstance(reason, socket.gaierror):
        return "its host cannot be found, so this computer seems to be offline, or needs HTTPS_PROXY"
    if isinstance(reason, http.client.IncompleteRead):
        return "the connection ended too early"
    return f"{reason}" or type(reason).__name__
