"""A model hub on loopback, as far as loads of pretrained parts ask: commits, their files, `main`.

FOLDER/OWNER/NAME/COMMIT/…      the files of a commit; `main` is the newest folder
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, folder: Path, **more: Any) -> None:
        self.folder = folder
        super().__init__(*args, **more)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        if words[:2] == ["api", "models"] and len(words) >= 4:
            self._about("/".join(words[2:4]), words[4:])
        elif len(words) >= 5 and words[2] == "resolve":
            self._file("/".join(words[:2]), words[3], "/".join(words[4:]))
        else:
            self._answer(404, {"X-Error-Code": "RepoNotFound"})

    def _about(self, repo: str, words: list[str]) -> None:
        """`/api/models/OWNER/NAME[/revision/REVISION | /tree/REVISION]`"""
        commit = self._commit(repo, words[1] if words[1:] else "main")
        if commit is None:
            missing = "RevisionNotFound" if (self.folder / repo).is_dir() else "RepoNotFound"
            self._answer(404, {"X-Error-Code": missing})
            return
        root = self.folder / repo / commit
        files = {str(f.relative_to(root)): f for f in sorted(root.rglob("*")) if f.is_file()}
        said: Any = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
        if words[:1] == ["tree"]:
            said = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in files.items()
            ]
        body = json.dumps(said).encode()
        self._answer(200, {"Content-Type": "application/json"}, body)

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return
        file = self.folder / repo / commit / name
        if not file.is_file():
            self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        body = file.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        about = {"ETag": etag, "X-Linked-ETag": etag, "X-Linked-Size": str(len(body))}
        self._answer(200, {**about, "X-Repo-Commit": commit}, body)

    def _commit(self, repo: str, revision: str) -> str | None:
        commits = [*(self.folder / repo).glob("*")] if (self.folder / repo).is_dir() else []
        if revision == "main" and commits:
            return max(commits, key=lambda commit: commit.stat().st_mtime_ns).name
        return revision if revision in [commit.name for commit in commits] else None

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Serve the repositories in `folder`; the address for HF_ENDPOINT."""
    handler = partial(_Handler, folder=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
