"""Decoding in a process of its own: a file that kills it, hangs it or fills its memory is a row.

Decoders are native code and meet the worst of the web. So they run in children of the job's
workers, each of which decodes what it is sent, one file at a time:

    worker ── bytes of a file ──▶ child: memory limited, libraries single-threaded
           ◀── JSON of the row, bytes of the stored image ──

A child that dies of a file (`decode:crashed`) or takes too long over it (`decode:timeout`) is
replaced by the next file. What it answers is data, never code: no pickles.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from pipelines.ingest.answers import clean
from pipelines.ingest.filters import FilterConfig, image_failure
from pipelines.pictures.decode import DecodeError, FailureClass, Opened, sha256
from pipelines.pictures.encode import ImageConfig
from pipelines.schemas import DECODE, FILTERED, OK, status

_BASE_MEMORY = 1 << 30  # address space of the libraries themselves, in bytes
_BYTES_PER_PIXEL = 32  # of a file of `max_pixels`: decoded, converted, resized, with copies
_ENDING = 5.0  # seconds that a child is given to go
_STARTING = 600.0  # seconds that a child is given to import its libraries, on a busy machine


def image_columns(data: bytes, image: ImageConfig, filters: FilterConfig) -> dict[str, Any]:
    """What the body of one URL adds to its row; every file ends as a row.

    A row that a filter rules out keeps the image's own size and its sha256, but no bytes.
    """
    row: dict[str, Any] = {"status": OK}
    try:
        opened = Opened(data, image.max_pixels)
        row |= {"original_width": opened.width, "original_height": opened.height}
        row["sha256"] = sha256(data)
        if rule := image_failure(filters, opened.width, opened.height):
            return row | {"status": status(FILTERED, rule)}
        stored = opened.store(image)
    except DecodeError as error:
        return _failed(error.kind, str(error))
    return row | {
        "image": {"bytes": stored.data, "path": None},
        "width": stored.width,
        "height": stored.height,
        "phash": stored.phash,
    }


def _failed(kind: FailureClass, message: str) -> dict[str, Any]:
    return {"status": status(DECODE, kind), "error": clean(message)}


class Decoder:
    """`image_columns` in a child process, which outlives files and is replaced when one kills it."""

    def __init__(self, image: ImageConfig, filters: FilterConfig) -> None:
        self.image = image
        self._settings = json.dumps(
            {"image": image.model_dump(mode="json"), "filters": filters.model_dump(mode="json")}
        )
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def __call__(self, data: bytes) -> dict[str, Any]:
        """The columns of one file's row. Never raises for what a file does."""
        try:
            return self._ask(data)
        except (EOFError, OSError):
            self._how_it_died()
        # Perhaps not of this file: what kills when memory runs out takes an idle child, too.
        try:
            return self._ask(data)
        except (EOFError, OSError):
            return _failed("crashed", f"the decoder died of it ({self._how_it_died()})")

    def _ask(self, data: bytes) -> dict[str, Any]:
        if self._child is None:
            self._start()
        self._pipe.send_bytes(data)
        if not self._pipe.poll(self.image.decode_timeout):
            self.close()
            return _failed("timeout", f"not decoded in {self.image.decode_timeout:g} seconds")
        row: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        if row.pop("stored"):
            row["image"] = {"bytes": self._pipe.recv_bytes(), "path": None}
        return row

    def close(self) -> None:
        """End the child, however busy it is."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._pipe.close()
            self._child = None

    def _start(self) -> None:
        ours, theirs = _socket_pair()
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs), self._settings],
            pass_fds=[theirs],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        os.close(theirs)
        self._pipe = Connection(ours)
        # Not on the time of the file that comes next, which has done nothing yet.
        if not self._pipe.poll(_STARTING):
            self._child.kill()
        self._pipe.recv_bytes()

    def _how_it_died(self) -> str:
        assert self._child is not None
        try:
            code = self._child.wait(_ENDING)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _socket_pair() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@contextmanager
def _quiet() -> Iterator[None]:
    """Native decoders write what they think of a file to the console; the row says it already."""
    console = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(console, 2)
        os.close(console)


def _serve(pipe: Connection, image: ImageConfig, filters: FilterConfig) -> None:
    """The child: rows for files, until the worker is gone."""
    limit = _BASE_MEMORY + _BYTES_PER_PIXEL * image.max_pixels
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send_bytes(b"ready")
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        with _quiet():
            row = image_columns(data, image, filters)
        stored = (row.pop("image", None) or {}).get("bytes")
        pipe.send_bytes(json.dumps({**row, "stored": stored is not None}).encode())
        if stored is not None:
            pipe.send_bytes(stored)


if __name__ == "__main__":
    descriptor, settings = sys.argv[1:]
    given = json.loads(settings)
    _serve(
        Connection(int(descriptor)),
        ImageConfig.model_validate(given["image"]),
        FilterConfig.model_validate(given["filters"]),
    )
