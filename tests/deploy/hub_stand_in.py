"""A server that answers ``huggingface_hub`` as the hub does: repositories, commits, LFS, tags, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"
COMMIT = "0" * 39 + "1"


class Hub:
    """What the server holds: files by repository (``models/a/b``), tags, sizes of what LFS was sent."""

    def __init__(self) -> None:
        self.address = ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, list[str]] = {}
        self.messages: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.unsigned = 0

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            made = json.loads(body)
            repo = f"{made.get('type', 'model')}s/{made['organization']}/{made['name']}"
            known = repo in self.created
            self.created.setdefault(repo, made)
            self.files.setdefault(repo, {})
            shown = repo.removeprefix("models/")
            return (409 if known else 200), {"url": f"{self.address}/{shown}", "error": "exists"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.lfs(o["oid"], o["size"]) for o in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        found = re.fullmatch(r"/api/(\w+/[\w-]+/[\w-]+)/(preupload|commit|tag)/main", path)
        if not found or found[1] not in self.files:
            return 404, {"error": "Repository not found"}
        return getattr(self, found[2])(found[1], body)

    def lfs(self, oid: str, size: int) -> dict[str, Any]:
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in self.stored:
            entry["actions"] = {"upload": {"href": f"{self.address}/lfs/{oid}"}}
        return entry

    def preupload(self, repo: str, body: bytes) -> tuple[int, Any]:
        answers = []
        for file in json.loads(body)["files"]:
            path, mode = file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular"
            there = self.files[repo].get(path)
            oid = None if there is None else self.oid(there, mode)
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}

    @staticmethod
    def oid(data: bytes, mode: str) -> str:
        if mode == "lfs":
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(f"{repo}: {value['summary']}")
            elif line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.stored[value["oid"]]
            else:
                return 400, {"error": line["key"]}
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}

    def tag(self, repo: str, body: bytes) -> tuple[int, Any]:
        tags = self.tags.setdefault(repo, [])
        if (tag := json.loads(body)["tag"]) in tags:
            return 409, {"error": "exists"}
        tags.append(tag)
        return 200, {}

    def get(self, path: str) -> bytes | None:
        """A file, or what ``repo_info`` asks; None if it is not there."""
        if found := re.fullmatch(r"/api/(\w+)/([\w-]+/[\w-]+)(?:/revision/main)?", path):
            here = f"{found[1]}/{found[2]}" in self.files
            info = {"id": found[2], "sha": COMMIT, "siblings": [], "tags": [], "private": False}
            return json.dumps(info).encode() if here else None
        found = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/(main|v[\w.]+)/([\w.]+)", path)
        if not found or (found[2] != "main" and found[2] not in self.tags[f"models/{found[1]}"]):
            return None
        return self.files.get(f"models/{found[1]}", {}).get(found[3])


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                hub.unsigned += 1
                self.answer(401, b'{"error": "no token"}')
                return
            status, said = hub.post(self.path.partition("?")[0], body)
            self.answer(status, json.dumps(said).encode())

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            right = self.path == f"/lfs/{hashlib.sha256(body).hexdigest()}"
            if right:
                hub.stored[self.path[5:]] = body
            self.answer(200 if right else 400, b"")

        def do_GET(self) -> None:
            data = hub.get(self.path.partition("?")[0])
            self.answer(404 if data is None else 200, data or b"{}")

        do_HEAD = do_GET

        def answer(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
