"""A Hub on this computer: the routes of huggingface.co that a pull and a push use, with commits in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 4096  # bytes from which a file goes by Git LFS


@dataclass
class Hub:
    """The repositories of a server, and the requests to it.

    Attributes:
        url: for HF_ENDPOINT.
        commits: the files by repository and commit.
        refs: the commit by repository and branch.
        private: the visibility that each repository was created with.
        sizes: sizes that the server states in place of the true ones, by name of a file.
        spoiled: names of files that are sent with another first byte.
        status: answer every request with this status.
        stall: seconds before every answer.
        requests: methods and paths, in their order.
        tokens: tokens that came with them.
    """

    url: str
    server: ThreadingHTTPServer
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    visibility: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int | None] = field(default_factory=dict)
    spoiled: set[str] = field(default_factory=set)
    status: int = 0
    stall: float = 0.0
    requests: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to those of a branch, and return the commit."""
        before = self.refs.setdefault(repo, {}).get(branch, "")
        content = {**self.commits.setdefault(repo, {}).get(before, {}), **files}
        digest = hashlib.sha1(before.encode() + repr(sorted(content.items())).encode()).hexdigest()
        self.commits[repo][digest] = content
        self.refs[repo][branch] = digest
        return digest

    def find(self, repo: str, revision: str) -> str | None:
        """Return the commit of a branch or commit, or None."""
        commit = self.refs[repo].get(revision, revision)
        return commit if commit in self.commits[repo] else None

    def close(self) -> None:
        """Stop."""
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers as huggingface.co does."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        if not self.misbehave():
            path = urlsplit(self.path).path
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self.model_info(found[1], unquote(found[2] or "main"))
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(found[1], unquote(found[2]), unquote(found[3]))
            else:
                self.answer(404, {"error": "no such route"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.misbehave():
            return
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.refs:
                self.answer(
                    409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}
                )
                return
            self.hub.visibility[repo] = asked.get(
                "visibility", "private" if asked.get("private") else "public"
            )
            self.hub.commit(repo, {})
            self.answer(200, {"url": f"{self.hub.url}/{repo}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.take_commit(found[1], unquote(found[2]), body)
        else:
            self.answer(404, {"error": "no such route"})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(body).hexdigest()
        assert self.path == f"/lfs/{digest}"
        self.hub.blobs[digest] = body
        self.answer(200, {})

    def misbehave(self) -> bool:
        """Note the request; answer as the test wants, if it does."""
        self.hub.requests.append(f"{self.command} {self.path}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.append(token)
        if self.hub.stall:
            time.sleep(self.hub.stall)
        if self.hub.status:
            self.answer(self.hub.status, {"error": "not today"})
        return bool(self.hub.status)

    def model_info(self, repo: str, revision: str) -> None:
        commit = self.commit_of(repo, revision)
        if commit is None:
            return
        files = []
        for name, data in self.hub.commits[repo][commit].items():
            entry: dict[str, Any] = {"rfilename": name}
            if parse_qs(urlsplit(self.path).query).get("blobs"):
                size = self.hub.sizes.get(name, len(data))
                entry |= {"size": size, "blobId": hashlib.sha1(data).hexdigest()}
                if len(data) >= LARGE:
                    digest = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
            files.append(entry)
        self.answer(200, {"id": repo, "sha": commit, "siblings": files, "tags": [], "private": False})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self.commit_of(repo, revision)
        if commit is None:
            return
        data = self.hub.commits[repo][commit].get(name)
        if data is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha256(data).hexdigest()
        if name in self.hub.spoiled:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def take_commit(self, repo: str, branch: str, body: bytes) -> None:
        if branch not in self.hub.refs[repo]:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.commit(repo, files, branch)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def commit_of(self, repo: str, revision: str) -> str | None:
        """Return the commit, or answer that there is none."""
        if repo not in self.hub.refs:  # huggingface.co says 401 without a token: it may be private
            self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.hub.find(repo, revision)
        if commit is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """Clients that go away are part of the tests."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


def serve() -> Hub:
    """Start a Hub without repositories on a free port."""
    server = Server(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", server)
    server.hub = hub  # type: ignore[attr-defined]
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    return hub
