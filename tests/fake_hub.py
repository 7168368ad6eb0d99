"""A Hub on this machine that speaks as much of the real one's HTTP as pushing and loading a model take."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = 4000
"""Files of this many bytes, and those of weights, go the way of large files."""


@dataclass
class FakeHub:
    """What it holds, what it was told, and what it is to do wrong.

    Attributes:
        url: where it listens.
        repos: repository -> branch -> name -> content.
        private: repository -> as it was created.
        commits: the message of every commit.
        requests: method and path of every request, in order.
        tokens: every token that a request brought.
        stored: large files by their sha256.
        broken: part of a path on which the connection drops.
        forbidden: whether it refuses every change.
    """

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)
    broken: str | None = None
    forbidden: bool = False

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo][branch]

    def commit_id(self, repo: str, branch: str) -> str:
        files = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in self.files(repo, branch).items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    # --- one method for each thing that a client asks for -----------------------------------------------------------

    def create(self, body: dict) -> dict:
        repo = f"{body.get('organization') or 'me'}/{body['name']}"
        self.repos.setdefault(repo, {"main": {}})
        self.private.setdefault(repo, body.get("visibility", "public") == "private")
        return {"url": f"{self.url}/{repo}"}

    def upload_modes(self, body: dict) -> dict:
        def mode(entry: dict) -> str:
            return "lfs" if entry["size"] >= LARGE or entry["path"].endswith(".safetensors") else "regular"

        return {"files": [{"path": e["path"], "uploadMode": mode(e), "shouldIgnore": False} for e in body["files"]]}

    def batch(self, body: dict) -> dict:
        def action(oid: str) -> dict:
            return {} if oid in self.stored else {"actions": {"upload": {"href": f"{self.url}/store/{oid}"}}}

        return {"objects": [{"oid": e["oid"], "size": e["size"], **action(e["oid"])} for e in body["objects"]]}

    def commit(self, repo: str, branch: str, lines: list[dict]) -> dict:
        files = dict(self.files(repo, branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[repo][branch] = files
        oid = self.commit_id(repo, branch)
        return {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}

    def info(self, repo: str, branch: str) -> dict:
        siblings = [{"rfilename": name} for name in self.files(repo, branch)]
        return {"id": repo, "sha": self.commit_id(repo, branch), "siblings": siblings, "tags": [], "private": False}

    def tree(self, repo: str, branch: str) -> list[dict]:
        files = self.files(repo, branch).items()
        return [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        hub, path, body = self.hub, unquote(urlsplit(self.path).path), self._body()
        hub.requests.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if hub.broken and hub.broken in path:
            self.close_connection = True
            return self.connection.close()
        if hub.forbidden and path.startswith("/api"):
            return self._send(403, b'{"error": "you have no right to write here"}')
        if path.startswith("/store/"):
            hub.stored[path.removeprefix("/store/")] = body
            return self._send(200, b"")
        if "/resolve/" in path:
            return self._file(*path.removeprefix("/").split("/resolve/"))
        return self._send_json(path, body)

    def _send_json(self, path: str, body: bytes) -> None:
        hub, parts = self.hub, path.strip("/").split("/")
        if parts[-1] == "batch":
            return self._json(hub.batch(json.loads(body)))
        if parts[1:] == ["repos", "create"]:
            return self._json(hub.create(json.loads(body)))
        if parts[1] == "validate-yaml":
            return self._json({"errors": [], "warnings": []})
        repo, verb, named = "/".join(parts[2:4]), (parts[4:5] or ["info"])[0], (parts[5:6] or ["main"])[0]
        if repo not in hub.repos:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if verb == "branch":
            hub.repos[repo].setdefault(named, dict(hub.files(repo)))
            return self._send(200, b"")
        branch = self._branch(repo, named)
        if verb == "preupload":
            return self._json(hub.upload_modes(json.loads(body)))
        if verb == "commit":
            return self._json(hub.commit(repo, branch, [json.loads(line) for line in body.splitlines()]))
        return self._json(hub.tree(repo, branch) if verb == "tree" else hub.info(repo, branch))

    def _file(self, repo: str, place: str) -> None:
        branch, _, name = place.partition("/")
        branches = self.hub.repos.get(repo, {})
        named = self._branch(repo, branch)
        if (content := branches.get(named, {}).get(name)) is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(200, content, {"ETag": tag, "X-Repo-Commit": self.hub.commit_id(repo, named)})

    def _branch(self, repo: str, name: str) -> str:
        """A branch by its own name, or by a commit's id: only that of main is ever asked for."""
        return name if name in self.hub.repos.get(repo, {}) else "main"

    def _json(self, values: object) -> None:
        self._send(200, json.dumps(values).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that huggingface_hub takes for the real one while the context lasts; files go over plain HTTP, not Xet."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
