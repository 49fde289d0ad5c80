"""
A stand-in of the Hub on the loopback: its HTTP interface, as far as huggingface_hub's own client uses it.

Repositories are kept in memory, with every commit. `requests` keeps every request with all of its bytes, and `faults`
says which requests fail, and how.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_LFS_SUFFIXES = (".safetensors", ".bin", ".png")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,94}")
_REPOSITORY = r"(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"


@dataclass
class Commit:
    """The whole tree after one commit."""

    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Branches and tags are names of commits; the first one is empty, as the Hub's."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add_commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        """A commit on a branch, with the files that are now in the tree."""
        parent = self.find(branch)
        oid = hashlib.sha1(f"{self.name}{len(self.commits)}{title}{sorted(files)}".encode()).hexdigest()
        self.commits.append(Commit(oid, title, {**(parent.files if parent else {}), **files}))
        self.branches[branch] = oid
        return self.commits[-1]

    def find(self, revision: str) -> Commit | None:
        """By branch, tag or oid."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)


@dataclass
class Account:
    """Whose token it is, and what may be done with it."""

    name: str
    role: str = "write"
    organizations: dict[str, str] = field(default_factory=dict)
    scoped: list[dict[str, Any]] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)  # what whoami says in the place of the usual

    def may_write(self, namespace: str) -> bool:
        """Whether repositories of a user or an organization can be changed with the token."""
        if self.role == "fineGrained":
            return any(
                scope["entity"]["name"] == namespace and "repo.write" in scope["permissions"] for scope in self.scoped
            )
        is_member = self.organizations.get(namespace) in ("write", "contributor", "admin")
        return self.role == "write" and (namespace == self.name or is_member)


@dataclass
class Fault:
    """
    What goes wrong with requests of which `METHOD path` matches `pattern`.

    `what` is a status number (before the request has its effect), "reset" (the connection, before the effect), "lost"
    (the connection, after the effect), "broken" (half an answer, after the effect), "garbage" (an answer that is not
    the Hub's, without the effect), or "slow" (the answer comes after `seconds`). `times` is for how many requests, and
    `skip` how many go well before.
    """

    pattern: str
    what: int | str
    times: int = 1
    skip: int = 0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


class HubStandIn:
    """The server, with its state; `start` and `stop` it, or use `running`."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.accounts: dict[str, Account] = {}
        self.objects: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, bytes]] = []
        self.lock = threading.RLock()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def start(self) -> "HubStandIn":
        """Serve, in a thread."""
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes] | None = None, kind: str = "model", **more: Any) -> Repository:
        """A repository that was there before."""
        repository = self.repositories[kind, name] = Repository(kind, name, **more)
        repository.add_commit("main", "initial commit", {})
        if files:
            repository.add_commit("main", "upload", files)
        return repository

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What is in a model's repository."""
        return self.repositories["model", name].find(revision).files

    def titles(self, name: str) -> list[str]:
        """Of the commits to a model's repository, without the first, which is empty."""
        return [commit.title for commit in self.repositories["model", name].commits[1:]]

    def paths(self, pattern: str = "") -> list[str]:
        """`METHOD path` of the requests that match."""
        return [f"{method} {path}" for method, path, _ in self.requests if re.search(pattern, f"{method} {path}")]

    def everything_sent(self) -> bytes:
        """Every byte of every request's body, with what is in base64 as it was."""
        bodies = [body for _, _, body in self.requests]
        contents = [content for body in bodies for content in _contents(body)]
        return b"\n".join([*bodies, *contents])


@contextmanager
def running() -> Iterator[HubStandIn]:
    """A stand-in that is stopped at the end."""
    hub = HubStandIn().start()
    try:
        yield hub
    finally:
        hub.stop()


def _contents(body: bytes) -> Iterator[bytes]:
    for line in body.splitlines():
        with suppress(ValueError, TypeError, KeyError):
            yield base64.b64decode(json.loads(line)["value"]["content"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubStandIn

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that the client closed, or a fault, is nothing to print."""


class _Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str = "", code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} | headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer comes 40 ms late
    timeout = 60
    server: _Server

    def log_message(self, *args: Any) -> None:
        """Quiet: `requests` has everything."""

    def handle_any(self) -> None:
        """One request, with its fault if it has one."""
        body = self._read()
        hub, target = self.server.hub, unquote(self.path)
        with hub.lock:
            hub.requests.append((self.command, target, body))
            fault = self._fault(f"{self.command} {target}")
        if fault and isinstance(fault.what, int):
            self._send(fault.what, b'{"error": "injected"}', fault.headers)
        elif fault and fault.what == "reset":
            self._reset()
        elif fault and fault.what == "garbage":
            self._send(200, b"<html>Sign in to this network</html>", {"Content-Type": "text/html"})
        else:
            if fault and fault.what == "slow":
                time.sleep(fault.seconds)
            self._answer(body, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _fault(self, request: str) -> Fault | None:
        for fault in self.server.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _answer(self, body: bytes, fault: Fault | None) -> None:
        headers: dict[str, str] = {}
        try:
            with self.server.hub.lock:
                status, content, headers = _Request(self, body).answer()
        except _Refused as refused:
            status, content, headers = refused.status, {"error": refused.message}, refused.headers
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"} | headers
        if fault and fault.what == "lost":
            self._reset()
        else:
            self._send(status, content, headers, half=bool(fault and fault.what == "broken"))

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: bytes, headers: dict[str, str], half: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self._reset()

    def _reset(self) -> None:
        # Closing with this option set sends a reset, which a server that died sends, too.
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class _Request:
    """One request's effect and answer: the status, the content, and headers."""

    def __init__(self, handler: _Handler, body: bytes) -> None:
        self.hub, self.method, self.body, self.handler = handler.server.hub, handler.command, body, handler
        parts = urlsplit(handler.path)
        self.raw_path, self.path, self.query = parts.path, unquote(parts.path), parse_qs(parts.query)
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise _Refused(401, "Invalid credentials in Authorization header")
        self.account = self.hub.accounts.get(token)

    def answer(self) -> tuple[int, Any, dict[str, str]]:
        """Found by the path; what was renamed is elsewhere, but for LFS and commits, of which nothing is promised."""
        for former, name in self.hub.moved.items():
            if self.method in ("GET", "HEAD") and re.search(f"/{former}(/|$)", self.path):
                return 307, b"", {"Location": self.handler.path.replace(former, name)}
        method = "GET" if self.method == "HEAD" else self.method
        for pattern, name in _ROUTES:
            found = re.fullmatch(pattern, f"{method} {self.raw_path}")
            if found:
                answer = getattr(self, name)(**{key: unquote(value) for key, value in found.groupdict("").items()})
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise _Refused(404, f"no route for {method} {self.path}")

    def whoami(self) -> dict[str, Any]:
        if self.account is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        account = self.account
        token = {"displayName": "test", "role": account.role}
        if account.role == "fineGrained":
            token["fineGrained"] = {"global": [], "scoped": account.scoped}
        organizations = [
            {"type": "org", "name": name, "roleInOrg": role} for name, role in account.organizations.items()
        ]
        usual = {"type": "user", "name": account.name, "orgs": organizations, "auth": {"accessToken": token}}
        return usual | account.answer

    def create(self) -> dict[str, Any]:
        wanted = json.loads(self.body)
        if self.account is None:
            raise _Refused(401, "Invalid username or password.")
        namespace, kind = wanted.get("organization") or self.account.name, wanted.get("type") or "model"
        name = f"{namespace}/{wanted['name']}"
        if not _NAME.fullmatch(wanted["name"]):
            raise _Refused(400, "Invalid repo name")
        if not self.account.may_write(namespace):
            raise _Refused(403, f"You don't have the rights to create a {kind} under the namespace {namespace}")
        url = {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"}
        if (kind, name) in self.hub.repositories:
            return 409, {"error": "You already created this model repo", **url}, {}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.add(name, kind=kind, private=private)
        return {**url, "name": name, "id": "1"}

    def info(self, kind: str, id: str, revision: str = "") -> dict[str, Any]:
        repository = self._repository(kind, id)
        commit = self._commit(repository, revision or "main")
        return {
            "id": repository.name,
            "modelId": repository.name,
            "sha": commit.oid,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in commit.files],
        }

    def auth_check(self, kind: str, id: str, write: str = "") -> dict[str, Any]:
        repository = self._repository(kind, id)
        if write:
            self._require_write(repository)
        return {}

    def refs(self, kind: str, id: str) -> dict[str, Any]:
        repository = self._repository(kind, id)
        return {
            "branches": _refs("heads", repository.branches),
            "tags": _refs("tags", repository.tags),
            "converts": [],
        }

    def branch(self, kind: str, id: str, name: str) -> dict[str, Any]:
        repository = self._writable(kind, id)
        if name in repository.branches:
            raise _Refused(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository.branches[name] = self._commit(repository, start).oid
        return {}

    def tag(self, kind: str, id: str, revision: str) -> dict[str, Any]:
        repository, name = self._writable(kind, id), json.loads(self.body)["tag"]
        if name in repository.tags:
            raise _Refused(409, "Tag reference exists already")
        repository.tags[name] = self._commit(repository, revision).oid
        return {}

    def tree(self, kind: str, id: str, revision: str, folder: str = "") -> list[dict[str, Any]]:
        commit = self._commit(self._repository(kind, id), revision)
        is_wanted = self.query.get("recursive", ["false"])[0].lower() == "true"
        names = [name for name in commit.files if name.startswith(folder) and (is_wanted or "/" not in name)]
        return [_describe(name, commit.files[name]) for name in sorted(names)]

    def paths_info(self, kind: str, id: str, revision: str) -> list[dict[str, Any]]:
        commit = self._commit(self._repository(kind, id), revision)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return [_describe(name, commit.files[name]) for name in wanted if name in commit.files]

    def commits(self, kind: str, id: str, revision: str) -> list[dict[str, Any]]:
        commits = reversed(self._repository(kind, id).commits)
        date = "2024-01-01T00:00:00.000Z"
        return [{"id": c.oid, "title": c.title, "message": "", "date": date, "authors": []} for c in commits]

    def preupload(self, kind: str, id: str, revision: str) -> dict[str, Any]:
        commit = self._commit(self._writable(kind, id), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(_LFS_SUFFIXES) else "regular"
            entry = {"path": name, "uploadMode": mode, "shouldIgnore": False}
            if name in commit.files:
                entry["oid"] = _digest(commit.files[name]) if mode == "lfs" else _blob_id(commit.files[name])
            files.append(entry)
        return {"files": files}

    def lfs_batch(self, id: str) -> dict[str, Any]:
        self._writable("models", id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs-store/{wanted['oid']}"}
            verify = {"href": f"{self.hub.url}/{id}.git/info/lfs/objects/verify"}
            actions = {} if wanted["oid"] in self.hub.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append(wanted | actions)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> dict[str, Any]:
        if _digest(self.body) != oid:
            raise _Refused(400, "the content is not what was announced")
        self.hub.objects[oid] = self.body
        return {}

    def lfs_get(self, oid: str) -> tuple[int, bytes, dict[str, str]]:
        return self._content(self.hub.objects[oid])

    def lfs_verify(self, id: str) -> dict[str, Any]:
        if json.loads(self.body)["oid"] not in self.hub.objects:
            raise _Refused(404, "no such object")
        return {}

    def validate_yaml(self) -> dict[str, Any]:
        content = json.loads(self.body)["content"]
        base = re.search(r"^base_model: *(.*)$", content.partition("\n---")[0], re.MULTILINE)
        if base and not re.fullmatch(r"['\"]?([\w.-]+/)?[\w.-]+['\"]?", base[1]):
            return 400, {"errors": [{"message": '"base_model" must be a Hub id'}], "warnings": []}, {}
        return {"errors": [], "warnings": []}

    def commit(self, kind: str, id: str, revision: str) -> dict[str, Any]:
        repository = self._writable(kind, id)
        lines = [json.loads(line) for line in self.body.splitlines()]
        head = self._commit(repository, revision)
        if revision not in repository.branches:
            raise _Refused(400, "A commit can only be made on a branch")
        if lines[0]["value"].get("parentCommit") not in (None, head.oid):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        files = {line["value"]["path"]: self._file(line) for line in lines[1:]}
        commit = repository.add_commit(revision, lines[0]["value"]["summary"], files)
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{id}/commit/{commit.oid}"}

    def _file(self, line: dict[str, Any]) -> bytes:
        value = line["value"]
        if line["key"] == "file":
            return base64.b64decode(value["content"])
        if value["oid"] not in self.hub.objects:
            raise _Refused(400, "Your push was rejected because an LFS pointer pointed to a file that does not exist")
        return self.hub.objects[value["oid"]]

    def resolve(self, kind: str, id: str, revision: str, name: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(kind or "models", id)
        commit = self._commit(repository, revision)
        if repository.gated and self.account is None:
            raise _Refused(401, f"Access to model {id} is restricted.", "GatedRepo")
        headers = {"X-Repo-Commit": commit.oid}
        if name not in commit.files:
            raise _Refused(404, "Entry not found", "EntryNotFound", **headers)
        content = commit.files[name]
        if not name.endswith(_LFS_SUFFIXES):
            status, part, more = self._content(content)
            return status, part, more | headers | {"ETag": f'"{_blob_id(content)}"'}
        oid = _digest(content)
        self.hub.objects[oid] = content
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"'}
        store = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as the Hub's
        return 302, b"", headers | linked | {"Location": f"{store}/lfs-store/{oid}"}

    def _content(self, content: bytes) -> tuple[int, bytes, dict[str, str]]:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.handler.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{_digest(content)}"'}
        if not wanted:
            return 200, content, headers
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start > end:
            raise _Refused(416, "range", **{"Content-Range": f"bytes */{len(content)}"})
        return 206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}

    def _repository(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get((KINDS[kind], name))
        is_hidden = repository is None or (repository.private and not self._may_read(name))
        if is_hidden:  # as the Hub: without a token, what is missing and what is private are the same
            raise _Refused(404 if self.account else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, kind: str, name: str) -> Repository:
        repository = self._repository(kind, name)
        self._require_write(repository)
        return repository

    def _require_write(self, repository: Repository) -> None:
        if self.account is None or not self.account.may_write(repository.name.partition("/")[0]):
            raise _Refused(403, "Forbidden: you must have write access to this repository")

    def _may_read(self, name: str) -> bool:
        namespace = name.partition("/")[0]
        return self.account is not None and namespace in (self.account.name, *self.account.organizations)

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


_ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"GET /api/{_REPOSITORY}", "info"),
    (rf"GET /api/{_REPOSITORY}/revision/(?P<revision>[^/]+)", "info"),
    (rf"GET /api/{_REPOSITORY}/auth-check(?P<write>/write)?", "auth_check"),
    (rf"GET /api/{_REPOSITORY}/refs", "refs"),
    (rf"POST /api/{_REPOSITORY}/branch/(?P<name>[^/]+)", "branch"),
    (rf"POST /api/{_REPOSITORY}/tag/(?P<revision>[^/]+)", "tag"),
    (rf"GET /api/{_REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    (rf"POST /api/{_REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"GET /api/{_REPOSITORY}/commits/(?P<revision>[^/]+)", "commits"),
    (rf"POST /api/{_REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"POST /api/{_REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
    (r"POST /(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"POST /(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/verify", "lfs_verify"),
    (r"PUT /lfs-store/(?P<oid>\w+)", "lfs_put"),
    (r"GET /lfs-store/(?P<oid>\w+)", "lfs_get"),
    (r"GET /((?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
)


def _refs(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]


def _describe(name: str, content: bytes) -> dict[str, Any]:
    described = {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
    if name.endswith(_LFS_SUFFIXES):
        described["lfs"] = {"oid": _digest(content), "size": len(content), "pointerSize": 130}
    return described


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
