"""A hub on loopback that takes data sets: repositories, uploads of large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secretsecretsecret"


@dataclass
class Hub:
    """What the hub holds, and what it does next."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # of the one repository
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    uploads: int = 0  # of large files
    commits: list[str] = field(default_factory=list)  # their messages
    failures: list[int] = field(default_factory=list)  # statuses of the next commits


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, hub: Hub, **more: Any) -> None:
        self.hub = hub
        super().__init__(*args, **more)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        if "/tree/" not in self.path:
            self._answer(404, {})
            return
        self._answer(200, [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in self.hub.files.items()
        ])  # fmt: skip

    def do_PUT(self) -> None:
        body, oid = self._body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.uploads += 1
        self._answer(200, {})

    def do_POST(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            self._answer(200, {"files": [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".parquet")],
                 "shouldIgnore": False} for f in files
            ]})  # fmt: skip
        elif path.endswith(".git/info/lfs/objects/batch"):
            found = []
            for one in json.loads(body)["objects"]:
                href = f"{self.hub.address}/upload/{one['oid']}"
                actions = {} if one["oid"] in self.hub.objects else {"upload": {"href": href}}
                found.append({**one, **({"actions": actions} if actions else {})})
            self._answer(200, {"transfer": "basic", "objects": found})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {})

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        known = repo in self.hub.private
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.private.setdefault(repo, bool(private))
        address = f"{self.hub.address}/datasets/{repo}"
        self._answer(409 if known else 200, {"url": address, "error": "You already created it"})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        if self.hub.failures:
            self._answer(self.hub.failures.pop(0), {"error": "not now"})
            return
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                self.hub.commits.append(value["summary"])
            elif kind == "lfsFile":
                self.hub.files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "deletedFile":
                del self.hub.files[value["path"]]
        repo = next(iter(self.hub.private))
        address = f"{self.hub.address}/datasets/{repo}/commit/{'1' * 40}"
        self._answer(200, {"commitUrl": address, "commitOid": "1" * 40})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def stand_in() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub=hub)) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
