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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from ..errors import UserError
from ..files import atomic_write_text, cannot_write
from ..progress import progress_bar
from ..text import printable

ATTEMPTS = 5  # connections that may fail one after the other without a byte more
TIMEOUT = 30.0  # seconds without a byte
BACK_OFF = 1.0  # seconds before the second attempt; twice as long before each further one
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
MD5_BESIDE = "md5-url"  # in place of a checksum: the publisher has it at the URL with ``.md5`` added

_CHUNK = 1 << 20
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}

T = TypeVar("T")


class _Failure(Exception):
    """A failed attempt; with ``retry``, another one may succeed, after ``wait`` seconds at least."""

    def __init__(
        self, message: str, *, retry: bool = False, wait: float = 0.0, code: int = 0, headers: Any = None
    ) -> None:
        super().__init__(message)
        self.retry, self.wait, self.code, self.headers = retry, wait, code, headers or {}


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise _Failure(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, target: Path, *, size: int | None = None, checksum: str = "") -> Path:
    """Fetch ``url`` into ``target``.

    Bytes that were received before a break stay in ``<target>.part`` and are continued, also by a later call.
    A second process waits for the first and finds the file. Proxies and certificates are those of the
    environment (``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``).

    Args:
        url: https.
        target: file to write; its folder is made.
        size: in bytes, if it is known.
        checksum: ``"sha256:<digits>"`` or ``"md5:<digits>"``, all or the first; :data:`MD5_BESIDE`, which is
            then kept as ``<target>.md5``; ``""`` if there is none.

    Raises:
        UserError: the file could not be fetched, or is not the published one. The message says where to put
            it by hand.
    """
    part, opener = _with_ending(target, ".part"), urllib.request.build_opener(_OnlyHttps())
    try:
        if urlsplit(url).scheme != "https":
            raise _Failure("it is not https")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if target.is_file():  # another process was faster
                return target
            if checksum == MD5_BESIDE:
                checksum = _retrying(lambda: _published(opener, url), part)
            _retrying(lambda: _attempt(opener, url, part, size), part)
            with part.open("rb+") as stream:
                os.fsync(stream.fileno())
            try:
                verify(part, size=size, checksum=checksum)
            except UserError:
                part.unlink(missing_ok=True)
                raise
            if checksum.startswith("md5:"):
                atomic_write_text(_with_ending(target, ".md5"), checksum.removeprefix("md5:") + "\n")
            os.replace(part, target)
            _with_ending(part, ".tag").unlink(missing_ok=True)
    except _Failure as error:
        raise UserError(
            "download-failed",
            f"cannot download {url}: {error}; fetch it by other means and put it at {target}",
        ) from error
    except OSError as error:
        raise cannot_write(target, error, "; GN_DETECT_CACHE names the folder") from error
    return target


def verify(file: Path, *, size: int | None = None, checksum: str = "") -> str:
    """Compare a file with the published size and checksum, and say in words which of them agree.

    Raises:
        UserError: another size or checksum.
    """
    found = file.stat().st_size
    if size is not None and found != size:
        raise UserError(
            "damaged-weights",
            f"{file} has {found} bytes, and {size} were published; remove and download it again",
        )
    if checksum == MD5_BESIDE:
        published = _with_ending(file, ".md5")
        checksum = f"md5:{published.read_text(encoding='ascii').strip()}" if published.is_file() else ""
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
            "damaged-weights",
            f"{file} has {kind} {digest.hexdigest()}, and {wanted} was published: it is damaged or was "
            "replaced; remove and download it again",
        )
    return f"{found} bytes, {kind} {wanted} as published"


def _with_ending(file: Path, ending: str) -> Path:
    return file.with_name(file.name + ending)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = FileLock(_with_ending(target, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that downloads {printable(target.name)}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _retrying(attempt: Callable[[], T], part: Path) -> T:
    """Call ``attempt``, again after a while as long as ``part`` grows or few calls in a row have failed."""
    failures = 0
    while True:
        before = _length(part)
        try:
            return attempt()
        except _Failure as error:
            failures = failures + 1 if _length(part) <= before else 1
            if not error.retry:
                raise
            if failures >= ATTEMPTS:
                raise _Failure(f"{error} ({ATTEMPTS} attempts)") from error
            pause = min(max(BACK_OFF * 2 ** (failures - 1), error.wait), LONGEST_WAIT)
            print(f"{printable(error)}; trying again in {pause:g} seconds", file=sys.stderr)
            time.sleep(pause)


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _published(opener: urllib.request.OpenerDirector, url: str) -> str:
    """Return the checksum at ``url.md5``; "" where the server has none."""
    try:
        with _open(opener, f"{url}.md5", {}) as response:
            text = response.read(200).decode("ascii", "replace").split()
    except _Failure as error:
        if error.code in (403, 404):
            return ""
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _failure(error) from error
    digits = text[0].lower() if text else ""
    if not re.fullmatch(r"[0-9a-f]{32}", digits):
        raise _Failure(f"{url}.md5 holds no checksum")
    return f"md5:{digits}"


def _open(opener: urllib.request.OpenerDirector, url: str, headers: dict[str, str]) -> Any:
    usual = {"User-Agent": "gn_detect", "Accept-Encoding": "identity"}
    try:
        return opener.open(urllib.request.Request(url, headers=usual | headers), timeout=TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        raise _failure(error) from error


def _failure(error: Exception) -> _Failure:
    if isinstance(error, urllib.error.HTTPError):
        message = f"the server answers {error.code} {' '.join(str(error.reason).split())}"
        wait = error.headers.get("Retry-After", "") if error.headers else ""
        seconds = float(wait) if wait.isdigit() else 0.0
        retry = error.code in _TEMPORARY
        return _Failure(message, retry=retry, wait=seconds, code=error.code, headers=error.headers)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return _Failure(f"the server's certificate is not trusted ({reason.verify_message})")
    if isinstance(reason, socket.gaierror):
        return _Failure(
            "its host cannot be found, so this computer seems to be offline, or needs HTTPS_PROXY"
        )
    if isinstance(reason, TimeoutError):
        return _Failure(f"nothing came for {TIMEOUT:g} seconds", retry=True)
    if isinstance(reason, http.client.IncompleteRead):
        return _Failure("the connection ended too early", retry=True)
    return _Failure(f"{reason}" or type(reason).__name__, retry=True)


def _attempt(opener: urllib.request.OpenerDirector, url: str, part: Path, size: int | None) -> None:
    """Continue ``part`` to its end.

    ``part.tag`` holds the server's ETag or date, so that bytes of another file are not continued.
    """
    start, tag, headers = _length(part), _with_ending(part, ".tag"), {}
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag.is_file():
            headers["If-Range"] = tag.read_text(encoding="latin1")
    try:
        response = _open(opener, url, headers)
    except _Failure as error:
        if error.code != 416:
            raise
        # The server has no more bytes: the part is whole, or of another file.
        total = str(error.headers.get("Content-Range", "")).rpartition("/")[2]
        if str(start) in (total, str(size)):
            return
        part.unlink(missing_ok=True)
        raise _Failure("the server's file is shorter than what was received before", retry=True) from error
    with response:
        resumed = response.status == 206
        if resumed and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise _Failure("the server sends another part than was asked for", retry=True)
        if response.headers.get_content_type() == "text/html":
            raise _Failure("the server sends a web page instead of the file")
        if not resumed:
            start = 0
            _keep_tag(tag, response.headers)
        _receive(response, part, start, size)


def _keep_tag(tag: Path, headers: Mapping[str, str]) -> None:
    text = headers.get("ETag", "")
    if not text or text.startswith("W/"):
        text = headers.get("Last-Modified", "")
    if text:
        tag.write_text(text, encoding="latin1")
    else:
        tag.unlink(missing_ok=True)


def _receive(response: Any, part: Path, start: int, size: int | None) -> None:
    """Write the body of a response to ``part``, from the byte ``start`` on."""
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else None
    if size is not None and total is not None and total != size:
        raise _Failure(f"the server's file has {total} bytes, and {size} were published")
    needed, free = (total or 0) - start, shutil.disk_usage(part.parent).free
    if needed > free:
        raise _Failure(f"it needs {needed} bytes, and {part.parent} has {free}; make room")
    limit, received = total if size is None else size, start
    name = printable(part.name.removesuffix(".part"))
    bar = progress_bar(total=total, initial=start, desc=name, unit="B", unit_scale=True, leave=True)
    with part.open("ab" if start else "wb") as file, bar:
        while chunk := _read(response):
            received += len(chunk)
            if limit is not None and received > limit:
                raise _Failure(f"the server sends more than {limit} bytes")
            file.write(chunk)
            bar.update(len(chunk))
    wanted = size if total is None else total
    if wanted is not None and received < wanted:
        raise _Failure(f"the connection ended after {received} of {wanted} bytes", retry=True)


def _read(response: Any) -> bytes:
    try:
        chunk: bytes = response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _failure(error) from error
    return chunk
