"""Decoding in a process of its own: a file that kills it, hangs it or fills its memory is a row.

Decoders are native code and meet the worst of the web. So they run in children of the job's
workers, each of which works on what it is sent, one file at a time:

    worker ── bytes of a file ──▶ child: memory limited, libraries single-threaded
           ◀── JSON, and bytes where there are any ──

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from pipelines.pictures.decode import DecodeError

_BASE_MEMORY = 1 << 30  # address space of the libraries themselves, in bytes
_BYTES_PER_PIXEL = 32  # of a file of `max_pixels`: decoded, converted, resized, with copies
_ENDING = 5.0  # seconds that a child is given to go
_STARTING = 600.0  # seconds that a child is given to import its libraries, on a busy machine

Answer = tuple[dict[str, Any], bytes | None]
"""What JSON can say of a file, and the bytes that were made of it."""


class Isolated:
    """A child that runs a module, which calls `serve`; it outlives files, and is replaced when one
    kills it. One thread at a time may ask it.
    """

    def __init__(self, module: str, settings: dict[str, Any], timeout: float) -> None:
        """`settings` are handed to the module as JSON; `timeout` are the seconds of a file."""
        self.module, self.timeout = module, timeout
        self._settings = json.dumps(settings)
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def ask(self, data: bytes) -> Answer:
        """What the module answers to a file. Raises DecodeError where it dies, or takes too long."""
        try:
            return self._ask(data)
        except (EOFError, OSError):
            self._how_it_died()
        # Perhaps not of this file: what kills when memory runs out takes an idle child, too.
        try:
            return self._ask(data)
        except (EOFError, OSError):
            why = f"the decoder died of it ({self._how_it_died()})"
            raise DecodeError("crashed", why) from None

    def _ask(self, data: bytes) -> Answer:
        if self._child is None:
            self._start()
        self._pipe.send_bytes(data)
        if not self._pipe.poll(self.timeout):
            self.close()
            raise DecodeError("timeout", f"not decoded in {self.timeout:g} seconds")
        answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        return answer["said"], self._pipe.recv_bytes() if answer["made"] else None

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
            [sys.executable, "-m", self.module, str(theirs), self._settings],
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


def serve(answer: Callable[[bytes], Answer], max_pixels: int) -> None:
    """The child: answers to files, until the worker is gone."""
    pipe = Connection(int(sys.argv[1]))
    limit = _BASE_MEMORY + _BYTES_PER_PIXEL * max_pixels
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send_bytes(b"ready")
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        with _quiet():
            said, made = answer(data)
        pipe.send_bytes(json.dumps({"said": said, "made": made is not None}).encode())
        if made is not None:
            pipe.send_bytes(made)


def given() -> dict[str, Any]:
    """The settings that a child was handed."""
    settings: dict[str, Any] = json.loads(sys.argv[2])
    return settings


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
