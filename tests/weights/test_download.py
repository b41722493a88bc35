"""Downloads from servers that behave and that do not; only to this computer."""

from __future__ import annotations

import hashlib
import multiprocessing
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gn_detect.errors import UserError
from gn_detect.weights import download as module
from gn_detect.weights.download import MD5_BESIDE, download, verify
from tests.refusal import refusal

from .server import Answer, Site, hang_up, nonsense, serve, stall, status, whole

DATA = bytes(range(256)) * 2000
SHA = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
MD5 = hashlib.md5(DATA).hexdigest()
SPOILED = bytes([DATA[0] ^ 1]) + DATA[1:]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An https server that is trusted; time-outs and waits are short."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    site = serve(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(module, "BACK_OFF", 0.01)
    monkeypatch.setattr(module, "TIMEOUT", 0.4)
    yield site
    site.server.shutdown()
    site.server.server_close()


def fetch(site: Site, target: Path, *answers: Answer, **known: object) -> Path:
    site.answers = list(answers)
    return download(f"{site.url}/weights.pkl", target, **known)  # type: ignore[arg-type]


GOOD: dict[str, tuple[list[Answer], int]] = {
    "whole": ([whole(DATA)], 1),
    "chunked": ([whole(DATA, chunked=True)], 1),
    "cut, then resumed": ([whole(DATA, cut=1000), whole(DATA)], 2),
    "cut many times, a bit further each time": ([*[whole(DATA, cut=40_000)] * 9, whole(DATA)], 10),
    "chunked and cut": ([whole(DATA, chunked=True, cut=1000), whole(DATA)], 2),
    "cut, and no ranges": ([whole(DATA, cut=1000, ranges=False), whole(DATA, ranges=False)], 2),
    "promises more than it has": ([whole(DATA[:5000], length=len(DATA)), whole(DATA)], 2),
    "sends another part": ([whole(DATA, cut=1000), whole(DATA, shift=7), whole(DATA)], 3),
    "busy": ([status(503), status(500), status(429, {"Retry-After": "0"}), whole(DATA)], 4),
    "hangs up": ([hang_up, whole(DATA)], 2),
    "not HTTP": ([nonsense, whole(DATA)], 2),
    "no answer": ([stall(0.8), whole(DATA)], 2),
    "stalls on the way": ([whole(DATA, pause=0.8), whole(DATA)], 2),
    "redirects": ([status(302, {"Location": "/elsewhere"}), whole(DATA)], 2),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_mended_is(site: Site, tmp_path: Path, name: str) -> None:
    answers, requests = GOOD[name]
    target = tmp_path / "cache" / "host" / "weights.pkl"
    assert fetch(site, target, *answers, size=len(DATA), checksum=SHA) == target
    assert target.read_bytes() == DATA
    assert len(site.requests) == requests
    assert {path.name for path in target.parent.iterdir()} <= {"weights.pkl", "weights.pkl.lock"}


BAD: dict[str, tuple[list[Answer], str, int]] = {
    "forbidden": ([status(403)], "answers 403 Forbidden", 1),
    "missing": ([status(404)], "answers 404 Not Found", 1),
    "always busy": ([status(503)], r"answers 503 Service Unavailable \(5 attempts\)", 5),
    "always cut at once": ([whole(DATA, cut=0)], r"ended after 0 of 512000 bytes \(5 attempts\)", 5),
    "never answers": ([hang_up], r"\(5 attempts\)", 5),
    "another size": ([whole(DATA[:-1])], "has 511999 bytes, and 512000 were published", 1),
    "too much, without a length": ([whole(DATA + b"more", chunked=True)], "more than 512000 bytes", 1),
    "a web page": ([status(200, {"Content-Type": "text/html"}, b"<p>log in")], "a web page instead", 1),
    "redirects for ever": ([status(302, {"Location": "/weights.pkl"})], "infinite loop", 5),
    "redirects to http": ([status(301, {"Location": "http://localhost:1/"})], "which is not https", 1),
    "redirects to a file": ([status(302, {"Location": "file:///etc/passwd"})], "is not allowed", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_mended_says_where_to_put_the_file(site: Site, tmp_path: Path, name: str) -> None:
    answers, message, requests = BAD[name]
    target = tmp_path / "cache" / "weights.pkl"
    with pytest.raises(UserError, match=message) as caught:
        fetch(site, target, *answers, size=len(DATA), checksum=SHA)
    text = str(caught.value)
    assert text.startswith(f"cannot download {site.url}/weights.pkl: ")
    assert "\n" not in text
    assert text.endswith(f"fetch it by other means and put it at {target}")
    assert not target.exists()
    assert len(site.requests) >= requests


@pytest.mark.parametrize("checksum", [SHA, SHA[:15], f"md5:{MD5}", MD5_BESIDE])
def test_other_bytes_than_published_are_thrown_away(site: Site, tmp_path: Path, checksum: str) -> None:
    site.md5 = status(200, body=f"{MD5}  weights.pkl\n".encode())
    target = tmp_path / "cache" / "weights.pkl"
    with refusal("damaged-weights"):
        fetch(site, target, whole(SPOILED), checksum=checksum)
    assert [path.name for path in target.parent.iterdir()] in (
        [],
        ["weights.pkl.lock"],
        ["weights.pkl.part.tag"],
    )
    fetch(site, target, whole(DATA), checksum=checksum)
    assert "as published" in verify(target, checksum=checksum)
    target.write_bytes(SPOILED)
    with refusal("damaged-weights"):
        verify(target, checksum=checksum)


def test_a_checksum_beside_the_file(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "weights.pkl"
    site.md5 = status(200, body=b"<Error>AccessDenied</Error>")
    with pytest.raises(UserError, match="holds no checksum"):
        fetch(site, target, whole(DATA), checksum=MD5_BESIDE)
    site.md5 = status(403)
    fetch(site, target, whole(DATA), checksum=MD5_BESIDE)
    assert verify(target, checksum=MD5_BESIDE) == "512000 bytes; its checksum was not downloaded"
    assert verify(target) == "512000 bytes; no checksum is published"
    with refusal("damaged-weights", "512000", "3 were"):
        verify(target, size=3)


def test_a_later_call_goes_on(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "weights.pkl"
    with pytest.raises(UserError):
        fetch(site, target, whole(DATA, cut=1000), status(404))
    assert (tmp_path / "weights.pkl.part").stat().st_size == 1000
    fetch(site, target, whole(DATA), checksum=SHA)
    assert site.ranges == [None, "bytes=1000-", "bytes=1000-"]


def test_a_whole_part_is_taken_as_it_is(site: Site, tmp_path: Path) -> None:
    (tmp_path / "weights.pkl.part").write_bytes(DATA)
    fetch(site, tmp_path / "weights.pkl", whole(DATA), checksum=SHA)
    assert site.ranges == [f"bytes={len(DATA)}-"]


def test_a_part_of_another_file_is_not_gone_on_with(site: Site, tmp_path: Path) -> None:
    """Told by the server's ETag, or by the length."""
    target = tmp_path / "weights.pkl"
    old, new = whole(SPOILED, cut=1000, headers={"ETag": '"1"'}), whole(DATA, headers={"ETag": '"2"'})
    fetch(site, target, old, new)
    assert target.read_bytes() == DATA
    target.unlink()
    (tmp_path / "weights.pkl.part").write_bytes(bytes(len(DATA) + 1))
    fetch(site, target, whole(DATA))
    assert target.read_bytes() == DATA


def test_only_https(tmp_path: Path) -> None:
    site = serve()
    with refusal("download-failed", "https"):
        download(f"{site.url}/weights.pkl", tmp_path / "w.pkl")
    assert site.requests == []
    site.server.shutdown()
    site.server.server_close()


def test_a_certificate_that_is_not_trusted(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with refusal("download-failed", "certificate"):
        fetch(site, tmp_path / "w.pkl", whole(DATA))


def test_a_server_that_speaks_no_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF", 0.01)
    site = serve()
    with refusal("download-failed", "(5 attempts)"):
        download(f"{site.url.replace('http', 'https')}/w.pkl", tmp_path / "w.pkl")
    site.server.shutdown()
    site.server.server_close()


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with refusal("download-failed", "refused", "(5 attempts)"):
        download(f"https://localhost:{port}/w.pkl", tmp_path / "w.pkl")


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not after all attempts."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(module, "BACK_OFF", 1e9)
    with refusal("download-failed", "host", "offline", "w.pkl"):
        download("https://weights.invalid/w.pkl", tmp_path / "w.pkl")


def test_proxies_of_the_environment(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve()
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with refusal("download-failed", "407"):
        download("https://weights.invalid/w.pkl", tmp_path / "w.pkl")
    assert [path for path, _ in proxy.requests] == ["weights.invalid:443"]
    monkeypatch.setenv("NO_PROXY", "localhost")
    fetch(site, tmp_path / "weights.pkl", whole(DATA), checksum=SHA)
    proxy.server.shutdown()
    proxy.server.server_close()


def test_a_second_process_waits_for_the_first(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both come at the same time; one fetches, and both have the file."""
    target = tmp_path / "cache" / "weights.pkl"
    site.answers = [whole(DATA, pause=1.0)]
    monkeypatch.setattr(module, "TIMEOUT", 20.0)
    context = multiprocessing.get_context("fork")  # each would import torch anew
    processes = [
        context.Process(target=lambda: download(f"{site.url}/weights.pkl", target, checksum=SHA))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(site.requests) == 1
    assert target.read_bytes() == DATA


def test_threads_of_one_process_share_a_download(site: Site, tmp_path: Path) -> None:
    site.answers = [whole(DATA, pause=0.1)]
    target = tmp_path / "weights.pkl"
    threads = [threading.Thread(target=lambda: download(f"{site.url}/weights.pkl", target)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert target.read_bytes() == DATA
    assert len(site.requests) == 1


def test_no_room(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: full)
    with refusal("download-failed", "512000", "1000"):
        fetch(site, tmp_path / "weights.pkl", whole(DATA))


def test_a_folder_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with refusal("cannot-write", "GN_DETECT_CACHE"):
        fetch(site, tmp_path / "cache" / "weights.pkl", whole(DATA))


def test_progress_is_for_terminals(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(site, tmp_path / "a.pkl", whole(DATA))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fetch(site, tmp_path / "b.pkl", whole(DATA))
    assert "b.pkl: 100%" in capsys.readouterr().err
