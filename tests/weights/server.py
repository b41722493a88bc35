"""A web server on this computer that misbehaves as its test wants."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers with the next of the server's ``answers``; with the last one from then on."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        site: Site = self.server.site  # type: ignore[attr-defined]
        site.requests.append((self.path, dict(self.headers)))
        self.close_connection = True
        if self.path.endswith(".md5"):
            site.md5(self)
            return
        site.answered += 1
        site.answers[min(site.answered, len(site.answers)) - 1](self)

    def do_CONNECT(self) -> None:
        self.server.site.requests.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        self.send_error(407)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """Clients that go away are part of the tests."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


@dataclass
class Site:
    """The requests to a server, and its answers.

    Attributes:
        url: of the server, without a slash at the end.
        answers: one for each request of a file.
        md5: for requests of names with ``.md5``.
        requests: paths and headers.
    """

    url: str
    server: ThreadingHTTPServer
    answers: list[Answer] = field(default_factory=list)
    md5: Answer = field(default_factory=lambda: status(404))
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    answered: int = 0

    @property
    def ranges(self) -> list[str | None]:
        """Return the ranges of the requests for the file."""
        return [headers.get("Range") for path, headers in self.requests if not path.endswith(".md5")]


def serve(folder: Path | None = None) -> Site:
    """A server on a free port; over TLS if there is a ``folder`` for its authority, ``ca.pem``."""
    server = Server(("127.0.0.1", 0), Handler)
    scheme = "http"
    if folder is not None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    site = Site(f"{scheme}://localhost:{server.server_address[1]}", server)
    server.site = site  # type: ignore[attr-defined]
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    return site


def whole(
    data: bytes,
    *,
    cut: int | None = None,
    length: int | None = None,
    ranges: bool = True,
    chunked: bool = False,
    shift: int = 0,
    pause: float = 0.0,
    headers: dict[str, str] | None = None,
) -> Answer:
    """The file, or the part that is asked for.

    Args:
        cut: close the connection after so many bytes.
        length: what Content-Length says, if it lies.
        ranges: honour Range.
        chunked: without Content-Length.
        shift: send another part than was asked for.
        pause: seconds in the middle.
        headers: more of them.
    """

    def answer(handler: Handler) -> None:
        start = 0
        asked = handler.headers.get("Range", "")
        condition = handler.headers.get("If-Range")
        unchanged = condition is None or condition == (headers or {}).get("ETag")
        if ranges and asked.startswith("bytes=") and unchanged:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(data):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(data)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start + shift}-{len(data) - 1}/{len(data)}")
        body = data[start + shift :]
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        body = body[:cut]
        if chunked:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) + (b"0\r\n\r\n" if cut is None else b""))
            return
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        time.sleep(pause)
        handler.wfile.write(body[len(body) // 2 :])

    return answer


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Answer:
    """An error, or a redirect with ``{"Location": ...}``."""

    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def stall(seconds: float) -> Answer:
    """No answer for a while."""
    return lambda handler: time.sleep(seconds)


def hang_up(handler: Handler) -> None:
    """Close the connection without a word."""


def nonsense(handler: Handler) -> None:
    """Not HTTP."""
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
