"""A Hub on this machine: as much of huggingface.co's HTTP API as huggingface_hub's own client needs to make, fill, read and refuse repositories of models.

In memory, with users, private repositories and faults on demand. huggingface_hub reads its address when it is imported, so its clients run in processes of their
own, in the environment that [`HubServer.environment`] gives.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_ENDINGS = (".safetensors", ".bin", ".pkl", ".pt", ".png")  # what a new repository's .gitattributes says
NAME = re.compile(r"[\w.-]+/(?!.*(--|\.\.))\w[\w.-]{0,95}")


@dataclass
class Commit:
    oid: str
    message: str
    author: str
    files: dict[str, bytes]  # all of the repository, as it is from here on


@dataclass
class Repository:
    private: bool
    commits: list[Commit]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


@dataclass
class Fault:
    """What is done to the next `times` requests (`None`: to all) whose "METHOD path" matches the pattern."""

    pattern: str
    status: int | None  # `None`: the connection is closed in the middle of the answer
    times: int | None


@dataclass
class Request:
    method: str
    path: str
    user: str | None
    status: int | None  # `None`: the connection was closed


@dataclass
class HubServer:
    """`with HubServer() as hub:` serves at `hub.url` until the end of the block.

    Args:
        users (`dict[str, str]`): By token, the names.
    """

    users: dict[str, str] = field(default_factory=lambda: {"hf_me": "me", "hf_you": "you"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # LFS objects by their sha256
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = "hf_me") -> dict[str, str]:
        """Of a client process; `home` is its cache, which starts empty."""
        kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        own = {} if token is None else {"HF_TOKEN": token}
        return {
            **kept,
            **own,
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }

    def fail(self, pattern: str, *, status: int | None = 503, times: int | None = None) -> None:
        self.faults.append(Fault(pattern, status, times))

    def mend(self) -> None:
        self.faults.clear()

    def create(self, name: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> Repository:
        made = self.repositories[name] = Repository(private, [])
        self.commit(name, "initial commit", name.split("/")[0], {".gitattributes": b"", **(files or {})})
        return made

    def commit(self, name: str, message: str, author: str, files: dict[str, bytes]) -> Commit:
        commits = self.repositories[name].commits
        oid = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append(Commit(oid, message, author, files))
        return commits[-1]

    def files(self, name: str) -> dict[str, bytes]:
        """Of a repository, as they are now, without what it was made with."""
        return {path: content for path, content in self.repositories[name].at("main").files.items() if path[0] != "."}

    def messages(self, name: str) -> list[str]:
        """Of a repository's commits, without the first, which the Hub itself makes."""
        return [commit.message for commit in self.repositories[name].commits[1:]]

    def asked(self, pattern: str) -> list[Request]:
        return [one for one in self.requests if re.search(pattern, f"{one.method} {one.path}")]


def is_large(path: str) -> bool:
    return path.endswith(LFS_ENDINGS)


def oid_of(path: str, content: bytes) -> str:
    """By which the Hub knows a file: sha256 of a large one, else git's."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        hub: HubServer = self.server.hub
        self.hub, self.body = hub, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        self.route, self.query = unquote(address.path), parse_qs(address.query)
        self.user: str | None = None
        for fault in hub.faults:
            if fault.times != 0 and re.search(fault.pattern, f"{self.command} {self.route}"):
                fault.times = None if fault.times is None else fault.times - 1
                return self.answer(fault.status, {"error": "a fault"}) if fault.status else self.break_off()
        try:
            self.user = self.who()
            for method, pattern, action in ROUTES:
                found = re.fullmatch(pattern, self.route)
                if found and self.command in method.split():
                    return action(self, **found.groupdict())
            raise Refused(404, f"no such route: {self.command} {self.route}")
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            return self.answer(refused.status, {"error": str(refused)}, headers)

    # ---------------------------------------------------------------- who may do what

    def who(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None or self.route.startswith("/lfs/"):
            return None
        token = given.removeprefix("Bearer ")
        if token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def signed_in(self) -> str:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        return self.user

    def readable(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.user != name.split("/")[0]):
            raise Refused(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return found

    def writable(self, name: str) -> Repository:
        self.signed_in()
        found = self.readable(name)
        if self.user != name.split("/")[0]:
            raise Refused(403, "Authorization error.")
        return found

    def revision(self, name: str, revision: str) -> Commit:
        found = self.readable(name).at(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # ---------------------------------------------------------------- the routes

    def whoami(self) -> None:
        self.answer(200, {"type": "user", "name": self.signed_in(), "fullname": self.user, "orgs": [], "auth": {}})

    def create(self) -> None:
        asked, user = json.loads(self.body), self.signed_in()
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not NAME.fullmatch(name):
            raise Refused(400, f"Invalid repo name: {name}")
        if not name.startswith(f"{user}/"):
            namespace = name.split("/")[0]
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        exists = name in self.hub.repositories
        if not exists:
            self.hub.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        content = {"url": f"{self.hub.url}/{name}", "id": name, "name": name}
        self.answer(409 if exists else 200, content | ({"error": "You already created this repo"} if exists else {}))

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.S)
        errors = []
        try:
            data = {} if front is None else yaml.safe_load(front[1])
            wrong = not isinstance(data, dict) or not isinstance(data.get("tags", []), list)
            errors = [{"message": '"tags" must be an array'}] if wrong else []
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        now = self.writable(name).at("main").files
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            oid = oid_of(path, now[path]) if path in now else None
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        self.writable(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}
            there = asked["oid"] in self.hub.large
            objects.append({**asked, **({} if there else {"actions": {"upload": upload}})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not that of its name")
        self.hub.large[oid] = self.body
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        files = dict(self.writable(name).at("main").files)
        message = ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"unknown key {line['key']}")
        made = self.hub.commit(name, message, self.user, files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid})

    def info(self, name: str, revision: str | None = None) -> None:
        commit = self.revision(name, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.hub.repositories[name].private
        self.answer(200, {"id": name, "sha": commit.oid, "siblings": siblings, "tags": [], "private": private})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        prefix = f"{folder}/" if folder else ""
        commit = self.revision(name, revision)
        found = [path for path in sorted(commit.files) if path.startswith(prefix)]
        if folder and not found:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            found = [path for path in found if "/" not in path.removeprefix(prefix)]
        entries = []
        for path in found:
            content = commit.files[path]
            entry = {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)}
            if is_large(path):
                entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.revision(name, revision)
        if path not in commit.files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        content = commit.files[path]
        headers = {"ETag": f'"{oid_of(path, content)}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if is_large(path):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            content = content[int(start[1]) :]
        self.answer(206 if start else 200, content, headers)

    # ---------------------------------------------------------------- answers

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self.hub.requests.append(Request(self.command, self.route, self.user, status))
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if body is content else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def break_off(self) -> None:
        self.hub.requests.append(Request(self.command, self.route, self.user, None))
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"{")
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}", Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("POST", rf"/api/models/{_NAME}/commit/{_REVISION}", Handler.commit),
    ("GET", rf"/api/models/{_NAME}(/revision/{_REVISION})?", Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/{_REVISION}(/(?P<folder>.+))?", Handler.tree),
    ("GET HEAD", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
)
