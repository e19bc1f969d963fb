"""Decoding in a child process: a file that crashes it, hangs it or exhausts its memory costs one row.

Decoders are native code that gets hostile files. So each worker has child processes, and each child
handles one file at a time:

    worker ── bytes of a file ──▶ child: memory limit, single-threaded libraries
           ◀── JSON, and bytes if there are any ──

A child that dies (`decode:crashed`) or takes too long (`decode:timeout`) is replaced for the next
file. Results are plain data: nothing is unpickled.
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

_BASE_MEMORY = 1 << 30  # bytes of address space for the libraries
_BYTES_PER_PIXEL = 32  # of `max_pixels`: decoded, converted, resized, with copies
_EXIT_SECONDS = 5.0
_START_SECONDS = 600.0  # to import the libraries on a busy machine

Result = tuple[dict[str, Any], bytes | None]
"""The data of a file that JSON can represent, and bytes made from the file."""


class ChildProcess:
    """A child that runs a module, which calls `serve`. It handles many files, and is replaced when
    one kills it. Not thread-safe.
    """

    def __init__(self, module: str, settings: dict[str, Any], timeout: float) -> None:
        """`settings` are passed to the module as JSON; `timeout` is in seconds per file."""
        self.module, self.timeout = module, timeout
        self._settings = json.dumps(settings)
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def request(self, data: bytes) -> Result:
        """The module's result for a file. Raises DecodeError if it dies or takes too long."""
        try:
            return self._request(data)
        except (EOFError, OSError):
            self._exit_reason()
        # The file may not be the cause: the kernel also kills idle children when memory runs out.
        try:
            return self._request(data)
        except (EOFError, OSError):
            reason = f"the decoder died of it ({self._exit_reason()})"
            raise DecodeError("crashed", reason) from None

    def _request(self, data: bytes) -> Result:
        if self._child is None:
            self._start()
        self._pipe.send_bytes(data)
        if not self._pipe.poll(self.timeout):
            self.close()
            raise DecodeError("timeout", f"not decoded in {self.timeout:g} seconds")
        message: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        return message["result"], self._pipe.recv_bytes() if message["has_bytes"] else None

    def close(self) -> None:
        """Kill the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._pipe.close()
            self._child = None

    def _start(self) -> None:
        parent_end, child_end = _socket_pair()
        self._child = subprocess.Popen(
            [sys.executable, "-m", self.module, str(child_end), self._settings],
            pass_fds=[child_end],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        os.close(child_end)
        self._pipe = Connection(parent_end)
        # The start does not count for the time-out of the next file.
        if not self._pipe.poll(_START_SECONDS):
            self._child.kill()
        self._pipe.recv_bytes()

    def _exit_reason(self) -> str:
        assert self._child is not None
        try:
            code = self._child.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _socket_pair() -> tuple[int, int]:
    parent_end, child_end = socket.socketpair()
    return parent_end.detach(), child_end.detach()


def serve(handle: Callable[[bytes], Result], max_pixels: int) -> None:
    """The loop of the child: call `handle` for each file, until the worker is gone."""
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
        with _silent_stderr():
            result, content = handle(data)
        message = {"result": result, "has_bytes": content is not None}
        pipe.send_bytes(json.dumps(message).encode())
        if content is not None:
            pipe.send_bytes(content)


def child_settings() -> dict[str, Any]:
    """The settings that the parent passed to this child."""
    settings: dict[str, Any] = json.loads(sys.argv[2])
    return settings


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Native decoders write warnings to stderr; the row already has the error."""
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    os.close(devnull)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
