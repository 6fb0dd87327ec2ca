"""A Hub on this machine: a server that the real `huggingface_hub` client talks to, and a process in which it does.

The server answers what the client asks when a model is pushed and loaded. As on huggingface.co, a private repository
hides from whoever may not see it. `Hub.fail` breaks a download where a test wants it to.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

USER, TOKEN = "me", "hf_mine"


class RefusedError(Exception):
    """An answer other than success, with the code by which the client tells one error from another."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Repo:
    """One repository: what each commit holds, and which commit a branch is at."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        sha = digest(f"{len(self.commits)} {branch}".encode())
        self.commits[sha] = self.files(branch) | changes
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})


class Hub(ThreadingHTTPServer):
    """The server: `url` for the client, `repos` to look at."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.faults: list[tuple[str, int | str]] = []
        self.unknown: list[str] = []

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        self.repos[name] = repo = Repo(private)
        repo.commit("main", {".gitattributes": b""} | (files or {}))
        return repo

    def fail(self, request: str, *how: int | str) -> None:
        """Break the next requests that match "METHOD path".

        `how` is a status; "cut" hangs up in the middle of the answer; "short" gives half of the file as the whole.
        """
        self.faults += [(request, one) for one in how]

    def handle_error(self, *args: Any) -> None:
        pass  # a client that hangs up is no news


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub
    REPO = "/api/models/(?P<name>[^/]+/[^/]+)"
    ROUTES = (
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate"),
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", REPO + "/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", REPO + "/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", REPO + "/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", REPO + "/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", REPO + "(/revision/(?P<revision>[^/]+))?", "info"),
        ("HEAD|GET", "/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.body = self.read()
        faults = self.server.faults
        match = next((fault for fault in faults if re.search(fault[0], f"{self.command} {path}")), None)
        if match:
            faults.remove(match)
        self.damage = match and match[1]
        try:
            if isinstance(self.damage, int):
                raise RefusedError(self.damage, "the server is unwell")
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if self.command in method.split("|") and match:
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(**parts)
                    return
            self.server.unknown.append(f"{self.command} {path}")
            raise RefusedError(404, f"no such endpoint: {path}")
        except RefusedError as refused:
            self.reply({"error": str(refused)}, refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = answer  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.damage == "short":
            content = content[: len(content) // 2]
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.damage == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(content)

    def repo(self, name: str, to_write: bool = False) -> Repo:
        owned, repo = self.token == TOKEN and name.startswith(f"{USER}/"), self.server.repos.get(name)
        if repo is None or (not owned and (to_write or repo.private)):
            # Nobody learns from the answer whether a private repository exists.
            raise RefusedError(404 if self.token == TOKEN else 401, "Repository not found", "RepoNotFound")
        return repo

    def whoami(self) -> None:
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if self.token != TOKEN:
            raise RefusedError(401, "You may not create a repository here")
        known = name in self.server.repos
        if not known:
            self.server.create(name, private=wanted.get("private") is True or wanted.get("visibility") == "private")
        self.reply({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def validate(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def branch(self, name: str, revision: str) -> None:
        branches = self.repo(name, to_write=True).branches
        branches.setdefault(revision, branches["main"])
        self.reply({})

    def preupload(self, name: str, revision: str) -> None:
        self.repo(name, to_write=True)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.reply({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        changes = {file["path"]: base64.b64decode(file["content"]) for file in files}
        sha = self.repo(name, to_write=True).commit(revision, changes)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(name)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def info(self, name: str, revision: str = "main") -> None:
        sha, files = self.found(name, revision)
        siblings = [{"rfilename": path} for path in files]
        self.reply({"id": name, "sha": sha, "private": self.repo(name).private, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        _, files = self.found(name, revision)
        self.reply([{"type": "file", "path": p, "size": len(c), "oid": digest(c)} for p, c in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self.found(name, revision)
        if path not in files:
            raise RefusedError(404, f"{path} is not in {name}", "EntryNotFound")
        self.reply(files[path], headers={"X-Repo-Commit": sha, "ETag": f'"{digest(files[path])}"'})


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


# The client --------------------------------------------------------------------------------------------------------

LEFT: list[str] = []  # addresses outside of this machine that the client's process tried to reach


def prepare() -> None:
    """What the client's process does first: refuse every other machine, and try again without a wait."""

    def refuse(event: str, arguments: tuple) -> None:
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host not in (None, "127.0.0.1", "::1", "localhost"):
            LEFT.append(f"{event} {host}")
            raise PermissionError(f"a test reached for {host}")

    sys.addaudithook(refuse)
    from huggingface_hub.utils import http_backoff

    http_backoff.__kwdefaults__["base_wait_time"] = 0  # as many tries as ever, but not up to 8 s apart


def left() -> list[str]:
    return LEFT


@contextmanager
def client(hub: Hub, home: Path) -> Iterator[Any]:
    """A function that runs others in a process of their own, where `huggingface_hub` has `hub` as its endpoint.

    The client reads its settings when it is imported, so they cannot be changed in the process of the tests.
    """
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, between compiled code and a storage service
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(home / "temporary"),
    }
    unset = ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
    (home / "temporary").mkdir()
    with ProcessPoolExecutor(1, get_context("spawn"), prepare) as process:
        with pytest.MonkeyPatch.context() as environment:
            for name in unset:
                environment.delenv(name, raising=False)
            for name, value in settings.items():
                environment.setenv(name, value)
            process.submit(left).result()  # it starts with the first call, and takes the settings along
        yield lambda function, *args, **options: process.submit(function, *args, **options).result()


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
