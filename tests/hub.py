"""A Hub on this machine: a server that the real `huggingface_hub` client talks to, and a process in which it does.

The server answers what the client asks when a model is pushed and loaded. As on huggingface.co, large files live on
another host, which wants no token; a private repository hides from whoever may not see it; and a commit is made whole
or not at all. `Hub.fail` lets it break where a test wants it to.
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
LARGE = (".safetensors", ".bin")


class RefusedError(Exception):
    """An answer other than success, with the code by which the client tells one error from another."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers | {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Repo:
    """One repository: what each commit holds, and which commit a branch is at."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        files = self.files(branch) | changes
        digest = hashlib.sha1(f"{len(self.commits)} {branch}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        self.commits[digest.hexdigest()] = files
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})


@dataclass
class Fault:
    request: str
    how: int | str
    times: int


class Hub(ThreadingHTTPServer):
    """The server: `url` for the client, `repos` and `requests` to look at."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # another host by name, as a CDN is
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str, str | None]] = []  # method, host, path, token
        self.unknown: list[str] = []

    def create(self, name: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        self.repos[name] = repo = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        if files:
            self.blobs |= {sha256(content): content for content in files.values()}
            repo.commit("main", files)
        return repo

    def fail(self, request: str, how: int | str, times: int = 1) -> None:
        """Break the next requests that match "METHOD path".

        `how` is a status; "drop" hangs up in the middle of what the client sends; "cut" hangs up in the middle of the
        answer; "short" gives half of the file as if it were the whole.
        """
        self.faults.append(Fault(request, how, times))

    def handle_error(self, *args: Any) -> None:
        pass  # a client that hangs up is no news


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub
    ROUTES = (
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate"),
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", "/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", "/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("GET", "/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", "/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("HEAD", "/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", "/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", "store"),
        ("GET", "/storage/(?P<oid>[0-9a-f]{64})", "stored"),
    )

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.damage: int | str | None = None
        self.server.requests.append((self.command, self.headers["Host"], url.path, self.token))
        for fault in self.server.faults:
            if fault.times > 0 and re.search(fault.request, f"{self.command} {url.path}"):
                fault.times -= 1
                self.damage = fault.how
                break
        if self.damage == "drop":
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            self.close_connection = True
            return
        self.body = self.read()
        try:
            if isinstance(self.damage, int):
                raise RefusedError(self.damage, "", "the server is unwell")
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if method == self.command and match:
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(**parts)
                    return
            self.server.unknown.append(f"{self.command} {url.path}")
            raise RefusedError(404, "", f"no such endpoint: {url.path}")
        except RefusedError as refused:
            self.reply({"error": str(refused)}, refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

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

    # Who may do what ------------------------------------------------------------------------------------------------

    def readable(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.owns(name)):
            # Nobody learns from the answer whether a private repository exists.
            raise RefusedError(404 if self.token == TOKEN else 401, "RepoNotFound", "Repository not found")
        return repo

    def writable(self, name: str) -> Repo:
        if not self.owns(name):
            raise RefusedError(403 if self.token == TOKEN else 401, "", "You may not write here")
        return self.readable(name)

    def owns(self, name: str) -> bool:
        return self.token == TOKEN and name.startswith(f"{USER}/")

    # Endpoints ------------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.token != TOKEN:
            raise RefusedError(401, "", "Invalid username or password.")
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if not self.owns(name):
            raise RefusedError(403 if self.token == TOKEN else 401, "", "You may not create a repository here")
        known = name in self.server.repos
        if not known:
            self.server.create(name, private=wanted.get("private") is True or wanted.get("visibility") == "private")
        self.reply({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def validate(self) -> None:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        self.reply({"errors": [] if front else [{"message": "no metadata"}], "warnings": []}, 200 if front else 400)

    def branch(self, name: str, revision: str) -> None:
        repo = self.writable(name)
        if revision in repo.branches:
            raise RefusedError(409, "", "Reference already exists")
        repo.branches[revision] = repo.branches["main"]
        self.reply({})

    def preupload(self, name: str, revision: str) -> None:
        files = self.writable(name).files(revision)
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answers.append({"path": path, "uploadMode": "lfs" if large(path) else "regular", "shouldIgnore": False})
            if path in files:
                answers[-1]["oid"] = sha256(files[path]) if large(path) else git_sha1(files[path])
        self.reply({"files": answers})

    def batch(self, name: str) -> None:
        self.writable(name)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.blobs:
                item["actions"] = {"upload": {"href": f"{self.server.storage}/storage/{item['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if sha256(self.body) != oid:
            raise RefusedError(400, "", "The content is not what its name says")
        self.server.blobs[oid] = self.body
        self.reply({})

    def commit(self, name: str, revision: str) -> None:
        repo = self.writable(name)
        if revision not in repo.branches:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        changes = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise RefusedError(400, "", f"{value['path']} was never uploaded")
                changes[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] != "header":
                raise RefusedError(400, "", f"unknown operation {line['key']}")
        sha = repo.commit(revision, changes)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.readable(name)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def info(self, name: str, revision: str = "main") -> None:
        sha, files = self.found(name, revision)
        private = self.server.repos[name].private
        siblings = [{"rfilename": path} for path in files]
        self.reply({"id": name, "sha": sha, "private": private, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        _, files = self.found(name, revision)
        self.reply([{"type": "file", "path": p, "size": len(c), "oid": git_sha1(c)} for p, c in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self.found(name, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            raise RefusedError(404, "EntryNotFound", f"{path} is not in {name}", **headers)
        content = files[path]
        if not large(path):
            self.reply(content, headers=headers | {"ETag": f'"{git_sha1(content)}"'})
            return
        oid = sha256(content)
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.reply(b"", 302, headers | {"Location": f"{self.server.storage}/storage/{oid}?signed=1"})

    def stored(self, oid: str) -> None:
        content = self.server.blobs[oid]
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.reply(content[start:], 206, headers)
        else:
            self.reply(content, 200, headers)


def large(path: str) -> bool:
    return path.endswith(LARGE)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


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
