"""A hub on the loopback address that speaks what huggingface_hub's own client asks of the real one."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

OWNER = "me"
TOKEN = "hf_of_the_owner"
_LARGE = (".safetensors", ".gguf")


def contents(folder):
    """The files of a folder, as a repository has them."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class RefusalError(Exception):
    """An answer that is not 200, with the header by which the client tells errors apart."""

    def __init__(self, status, code="", message="", **more):
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more


@dataclass
class Repository:
    """Commits are whole trees; branches are names of commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False
    gated: bool = False
    locked: bool = False

    def commit(self, branch, files, message="commit"):
        """A commit on a branch, of the branch's files with some of them new."""
        tree = self.commits.get(self.branches.get(branch), {}) | files
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(tree)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha

    def files(self, branch="main"):
        return self.commits[self.branches[branch]]

    def resolve(self, revision):
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class FakeHub:
    """Repositories in memory behind HTTP.

    Attributes:
        url: Where it listens, for ``HF_ENDPOINT``.
        repositories: By ``owner/name``.
        requests: Method and path of every request.
        unknown: Those of them that it has no answer to; a test with any fails at its end.
        before_commit: Called when a commit arrives, as somebody else who is faster would be.
    """

    def __init__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                hub.requests.append((self.command, self.path))
                hub.authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    headers, content = hub.answer(self.command, unquote(urlsplit(self.path).path), body)
                    status = 200
                except RefusalError as refusal:
                    status, content = refusal.status, json.dumps({"error": refusal.message} | refusal.more).encode()
                    headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                self.send_response(status, HTTPStatus(status).phrase)
                for name, value in (headers | {"Content-Length": len(content)}).items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - http.server's names

            def log_message(self, *_):
                pass

        self.repositories, self.requests, self.large, self.before_commit = {}, [], {}, lambda: None
        self.authorized, self.unknown = False, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def add(self, name, files, **settings):
        """A repository that somebody made before."""
        self.repositories[name] = Repository(**settings)
        self.repositories[name].commit("main", files)
        return self.repositories[name]

    def answer(self, method, path, body):
        """Headers and content for a request."""
        parts = path.strip("/").split("/")
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return self._validate(json.loads(body)["content"])
            case "GET", ["api", "agent-harnesses"]:  # the client's own question; the real hub's answer is of no matter
                raise RefusalError(404)
            case "GET", ["api", "models", owner, name]:
                return self._info(f"{owner}/{name}", "main")
            case "GET", ["api", "models", owner, name, "revision", revision]:
                return self._info(f"{owner}/{name}", revision)
            case "GET", ["api", "models", _, _, "tree", _, *folder]:
                raise RefusalError(404, "EntryNotFound", f"{'/'.join(folder)} does not exist")  # no folders here
            case "POST", ["api", "models", owner, name, "branch", branch]:
                return self._branch(f"{owner}/{name}", branch)
            case "POST", ["api", "models", owner, name, "preupload", _]:
                files = json.loads(body)["files"]
                self._writable(f"{owner}/{name}")
                return _json({"files": [_upload_mode(file["path"]) for file in files]})
            case "POST", ["api", "models", owner, name, "commit", revision]:
                return self._commit(f"{owner}/{name}", revision, [json.loads(line) for line in body.splitlines()])
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return self._batch(json.loads(body)["objects"])
            case "PUT", ["lfs", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self.large[oid] = body
                return {}, b""
            case "GET" | "HEAD", [owner, name, "resolve", revision, *file]:
                return self._file(f"{owner}/{name}", revision, "/".join(file))
        self.unknown.append((method, path))
        raise RefusalError(404)  # an error of the server's own would be asked again for half a minute

    def _repository(self, name):
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not self.authorized):
            raise RefusalError(401, "RepoNotFound", "Repository not found")
        return repository

    def _writable(self, name):
        repository = self._repository(name)
        if repository.locked:
            raise RefusalError(403, "", "You don't have the rights to write here")
        return repository

    def _create(self, wanted):
        name = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        if name in self.repositories:
            raise RefusalError(409, "", "You already created this model repo", url=f"{self.url}/{name}")
        self.add(name, {".gitattributes": b""}, private=wanted.get("visibility") == "private")
        return _json({"url": f"{self.url}/{name}"})

    def _validate(self, content):
        _, metadata, _ = content.split("---\n", 2)
        base = yaml.safe_load(metadata).get("base_model")
        if base is not None and base.count("/") != 1:
            raise RefusalError(400, "", "base_model is not a model id")
        return _json({"errors": [], "warnings": []})

    def _info(self, name, revision):
        repository = self._repository(name)
        sha = repository.resolve(revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        return _json({"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": [], "downloads": 0})

    def _branch(self, name, branch):
        repository = self._writable(name)
        if branch in repository.branches:
            raise RefusalError(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return _json({})

    def _batch(self, objects):
        wanted = [
            {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
            for one in objects
            if one["oid"] not in self.large
        ]
        return _json({"transfer": "basic", "objects": wanted})

    def _commit(self, name, revision, lines):
        self.before_commit()
        repository = self._writable(name)
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        if header.get("parentCommit") not in (None, repository.branches[revision]):
            raise RefusalError(412, "", "A commit has happened since. Please refresh and try again.")
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                assert line["key"] == "header", line
        sha = repository.commit(revision, files, header["summary"])
        return _json({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"})

    def _file(self, name, revision, path):
        repository = self._repository(name)
        if repository.gated:
            raise RefusalError(403, "GatedRepo", "Access to this model is restricted")
        sha = repository.resolve(revision)
        content = repository.commits[sha].get(path)
        if content is None:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        return {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content


def _upload_mode(path):
    return {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular", "shouldIgnore": False}


def _json(value):
    return {"Content-Type": "application/json"}, json.dumps(value).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake hub that the client in this process talks to."""
    with FakeHub().running() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # files go through the LFS endpoints
        yield fake
    assert fake.unknown == []
