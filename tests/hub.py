"""A Hub on this machine: a server that the real `huggingface_hub` client talks to, and a process in which it does.

The server answers what the client asks when a model is pushed and loaded. As on huggingface.co, a private repository
hides from whoever may not see it. A request that matches one of `Hub.faults` is answered with status 503.
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
    """An answer other than success: its status, and the code by which the client tells one error from another."""


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

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise RefusedError(404, "RevisionNotFound")
        return sha


class Hub(ThreadingHTTPServer):
    """The server: `url` for the client, `repos` to look at."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.faults: set[str] = set()  # patterns of "METHOD path"
        self.unknown: list[str] = []

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> None:
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", {".gitattributes": b""} | (files or {}))

    def handle_error(self, *args: Any) -> None:
        pass  # a client that hangs up is no news


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        body, status = self.read(), 200
        try:
            if any(re.search(fault, f"{self.command} {path}") for fault in self.server.faults):
                raise RefusedError(503, "")
            content, headers = self.found(path, body)
        except RefusedError as refused:
            status, code = refused.args
            content, headers = {"error": code}, {"X-Error-Code": code} if code else {}
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

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

    def found(self, path: str, body: bytes) -> tuple[Any, dict[str, str]]:
        """The answer to a request: its content and headers."""
        hub = self.server
        match [unquote(part) for part in path.strip("/").split("/")]:
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or USER}/{wanted['name']}"
                if self.token != TOKEN:
                    raise RefusedError(401, "")
                if name not in hub.repos:
                    hub.create(name, private=wanted.get("private") is True or wanted.get("visibility") == "private")
                return {"url": f"{hub.url}/{name}", "name": name}, {}
            case ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}, {}
            case ["api", "whoami-v2"]:
                return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}, {}
            case ["api", "models", owner, name, *wanted]:
                return self.about(f"{owner}/{name}", wanted, body), {}
            case [owner, name, "resolve", revision, *parts]:
                repo, file = self.repo(f"{owner}/{name}"), "/".join(parts)
                sha = repo.sha(revision)
                if file not in repo.commits[sha]:
                    raise RefusedError(404, "EntryNotFound")
                content = repo.commits[sha][file]
                return content, {"X-Repo-Commit": sha, "ETag": f'"{digest(content)}"'}
        hub.unknown.append(f"{self.command} {path}")
        raise RefusedError(404, "")

    def about(self, name: str, wanted: list[str], body: bytes) -> Any:
        """The answer about a repository."""
        repo = self.repo(name)
        match wanted:
            case [] | ["revision", _]:
                sha = repo.sha((wanted or ["", "main"])[1])
                siblings = [{"rfilename": path} for path in repo.commits[sha]]
                return {"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}
            case ["tree", revision]:
                files = repo.commits[repo.sha(revision)]
                return [{"type": "file", "path": p, "size": len(c), "oid": digest(c)} for p, c in files.items()]
            case ["branch", revision]:
                repo.branches.setdefault(revision, repo.branches["main"])
                return {}
            case ["preupload", _]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            case ["commit", revision]:
                lines = [json.loads(line) for line in body.splitlines()]
                files = [line["value"] for line in lines if line["key"] == "file"]
                sha = repo.commit(revision, {file["path"]: base64.b64decode(file["content"]) for file in files})
                return {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}
        raise RefusedError(404, "")

    def repo(self, name: str) -> Repo:
        is_owner, repo = self.token == TOKEN and name.startswith(f"{USER}/"), self.server.repos.get(name)
        if repo is None or (not is_owner and (self.command == "POST" or repo.private)):
            # Nobody learns from the answer whether a private repository exists.
            raise RefusedError(404 if self.token == TOKEN else 401, "RepoNotFound")
        return repo


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
