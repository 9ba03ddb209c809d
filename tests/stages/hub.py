"""A local stand-in of the hub: the HTTP API that huggingface_hub calls to make a repository, look at it,
upload (small files in the commit, large ones by LFS) and download. It keeps what it was sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_the_token_of_the_test"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """repos by name; objects: LFS content by sha256. refuse: path part -> status that it is answered with;
    cut: the line breaks when the commit is sent."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)
    cut: bool = False
    calls: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for key, text in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_call(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        hub.calls.append(f"{self.command} {path}")
        for part, status in hub.refuse.items():
            if part in path:
                return self.answer({"error": "said the hub"}, status)
        if path.startswith("/objects/"):
            hub.objects[path.removeprefix("/objects/")] = body
            return self.answer()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            private = asked.get("private", asked.get("visibility") == "private")
            hub.repos[name] = Repo(bool(private), {".gitattributes": b""})
            return self.answer({"url": f"{hub.endpoint}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        owner, name, *rest = path.removeprefix("/api/models/").strip("/").split("/")
        key = f"{owner}/{name.removesuffix('.git')}"
        if (repo := hub.repos.get(key)) is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.of_repo(key, repo, rest, body)

    def of_repo(self, key: str, repo: Repo, rest: list[str], body: bytes) -> None:
        hub = self.hub
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in sorted(repo.files)]
            return self.answer({"id": key, "private": repo.private, "siblings": siblings, "sha": "0" * 40})
        if rest[0] == "preupload":
            found = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": found})
        if rest[:2] == ["info", "lfs"]:
            objects = []
            for one in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.endpoint}/objects/{one['oid']}"}}
                objects.append(one | ({} if one["oid"] in hub.objects else {"actions": upload}))
            return self.answer({"transfer": "basic", "objects": objects})
        if rest[0] == "commit":
            if hub.cut:
                self.close_connection = True
                self.connection.close()
                return None
            return self.commit(key, repo, body)
        assert rest[0] == "resolve", self.path
        data = repo.files[rest[2]]
        etag = hashlib.sha256(data).hexdigest()
        return self.answer(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40})

    def commit(self, key: str, repo: Repo, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        oid = f"{len(repo.commits):040x}"
        url = f"{self.hub.endpoint}/{key}/commit/{oid}"
        self.answer({"commitUrl": url, "commitOid": oid, "success": True})

    do_GET = do_HEAD = do_POST = do_PUT = handle_call


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub that answers inside the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
