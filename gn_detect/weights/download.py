"""Files over https: resumed, checked, and in place only when they are whole."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import ssl
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

ATTEMPTS = 5
"""Connections that may fail one after the other without a byte more."""

TIMEOUT = 30.0
"""Seconds without a byte."""

BACK_OFF = 1.0
"""Seconds before the second attempt; twice as long before each further one."""

_CHUNK = 1 << 20
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


class _Retry(Exception):
    """The connection failed in a way that another attempt may mend."""


class _Final(Exception):
    """No attempt will help."""


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise _Final(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    checksum: str = "",
    context: ssl.SSLContext | None = None,
) -> Path:
    """Fetch ``url`` into ``target``.

    What was received before a break stays beside the target as ``.part`` and is continued, also by a later
    call. A second process waits for the first and finds the file. Proxies are those of the environment.

    Args:
        url: https.
        target: file to write; its folder is made.
        size: in bytes, if it is known.
        checksum: ``"sha256:<digits>"`` or ``"md5:<digits>"``, all or the first; ``"md5-url"`` if ``url`` with
            ``.md5`` behind it holds it; ``""`` if there is none.
        context: certificates to trust; by default the system's.

    Raises:
        UserError: the file could not be fetched, or is not what was published. The message says where to put
            it by hand.
    """
    part = target.with_name(target.name + ".part")
    try:
        if urlsplit(url).scheme != "https":
            raise _Final("it is not https")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if target.is_file():  # another process was faster
                return target
            opener = urllib.request.build_opener(
                urllib.request.HTTPSHandler(context=context), _OnlyHttps(), urllib.request.ProxyHandler()
            )
            checksum = _published(opener, url) if checksum == "md5-url" else checksum
            _fetch(opener, url, part, size)
            try:
                verify(part, size=size, checksum=checksum)
            except UserError:
                part.unlink(missing_ok=True)
                raise
            _sync(part)
            os.replace(part, target)
    except (_Final, _Retry) as error:
        raise UserError(
            f"cannot download {url}: {error}; fetch it by other means and put it at {target}"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def verify(file: Path, *, size: int | None = None, checksum: str = "") -> str:
    """Compare a file with what was published, and say what was compared.

    Raises:
        UserError: another size or checksum.
    """
    found = file.stat().st_size
    if size is not None and found != size:
        raise UserError(f"{file} has {found} bytes, and {size} were published; download it again")
    kind, _, wanted = checksum.partition(":")
    if kind not in ("sha256", "md5"):
        return f"{found} bytes, no checksum published" if checksum == "" else f"{found} bytes"
    digest = hashlib.new(kind, usedforsecurity=False)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(wanted):
        raise UserError(
            f"{file.name} has {kind} {digest.hexdigest()}, and {wanted} was published: it is damaged or was "
            "replaced; download it again"
        )
    return f"{found} bytes, {kind} {wanted} as published"


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    lock = FileLock(str(target) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that downloads {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _published(opener: urllib.request.OpenerDirector, url: str) -> str:
    """The content of ``url.md5``; "" where the server has none."""
    try:
        with opener.open(f"{url}.md5", timeout=TIMEOUT) as response:
            text = response.read(200).decode("ascii", "replace").split()
    except urllib.error.HTTPError as error:
        if error.code in (403, 404):
            return ""
        raise _Final(f"its checksum at {url}.md5 gives {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Final(_reason(error)) from error
    digits = text[0].lower() if text else ""
    if len(digits) != 32 or set(digits) - set("0123456789abcdef"):
        raise _Final(f"{url}.md5 holds no checksum")
    return f"md5:{digits}"


def _fetch(opener: urllib.request.OpenerDirector, url: str, part: Path, size: int | None) -> None:
    """Until ``part`` is whole; every attempt goes on where the last one stopped."""
    failures, wait = 0, BACK_OFF
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _attempt(opener, url, part, size)
            return
        except _Retry as error:
            after = part.stat().st_size if part.exists() else 0
            failures, wait = (failures + 1, wait * 2) if after <= before else (1, BACK_OFF)
            if failures >= ATTEMPTS:
                raise _Retry(f"{error} ({ATTEMPTS} attempts)") from error
            time.sleep(min(wait, 60.0))


def _attempt(opener: urllib.request.OpenerDirector, url: str, part: Path, size: int | None) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "gn_detect", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing behind what is here: whole, or of another file
            if size != start:
                part.unlink()
                raise _Retry("the server's file is shorter than what was received before") from error
            return
        kind = _Retry if error.code in _TEMPORARY else _Final
        raise kind(f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(_reason(error)) from error
    with response:
        resumed = response.status == 206
        if resumed and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            part.unlink()
            raise _Retry("the server sends another part than was asked for")
        start = start if resumed else 0
        told = response.headers.get("Content-Length", "")
        total = start + int(told) if told.isdigit() else None
        _check_room(part, total, size, start)
        with part.open("ab" if resumed else "wb") as file:
            _receive(response, file, part.name.removesuffix(".part"), start, total, size)


def _check_room(part: Path, total: int | None, size: int | None, start: int) -> None:
    if size is not None and total is not None and total != size:
        raise _Final(f"the server's file has {total} bytes, and {size} were published")
    needed, free = (total or 0) - start, shutil.disk_usage(part.parent).free
    if needed > free:
        raise _Final(f"it needs {needed} bytes, and {part.parent} has {free}")


def _receive(
    response: Any, file: IO[bytes], name: str, start: int, total: int | None, size: int | None
) -> None:
    limit = size if size is not None else total
    with tqdm(total=total, initial=start, desc=name, unit="B", unit_scale=True) as bar:
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
    if total is not None and received < total:
        raise _Retry(f"the connection ended after {received} of {total} bytes")
    if size is not None and received < size:
        raise _Retry(f"the connection ended after {received} of {size} bytes")


def _sync(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _reason(error: BaseException) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"nothing came for {TIMEOUT:.0f} seconds"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted ({reason.verify_message})"
    return f"{reason}" or type(reason).__name__
