"""Folders that one process holds at a time: on a disk by a lock, in an object store by a lease."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.storage.files import remove_halves
from pipelines.storage.folders import make_folder
from pipelines.storage.protocols import is_url
from pipelines.storage.retries import with_retries
from vlv_model.errors import RunError

LOCK_FILE = ".lock"
_LEASE = 120.0  # seconds after which a lock in an object store counts as abandoned
_RENEW = 30.0


@contextmanager
def exclusive(folder: Path, setting: str, renew_every: float = _RENEW) -> Iterator[None]:
    """Hold a folder for this process; RunError while another one holds it.

    On a local disk the lock goes with the process, however it ends, and holds on one machine; what
    killed writers left half-written in the folder is removed: at the start that of an earlier job,
    at the end that of workers which this one has outlived. In an object store it is a file that
    is renewed (after `renew_every` seconds), and is taken over where nobody has for two minutes.
    """
    make_folder(folder, setting)
    held = _lease(folder, setting, renew_every) if is_url(folder) else _file_lock(folder, setting)
    with held:
        yield


def _in_use(folder: Path, setting: str) -> RunError:
    return RunError(f"{setting}={folder} is in use by a job that is still going: wait for its end")


@contextmanager
def _file_lock(folder: Path, setting: str) -> Iterator[None]:
    with open(folder / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(folder, setting) from None
        remove_halves(folder)
        try:
            yield
        finally:
            remove_halves(folder)


@contextmanager
def _lease(folder: Path, setting: str, renew_every: float) -> Iterator[None]:
    lock, me = folder / LOCK_FILE, f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    remote: Any = lock

    def renew() -> None:
        with_retries(lambda: lock.write_text(json.dumps({"owner": me, "time": time.time()})), lock)

    def holder() -> dict[str, Any]:
        # In one request: an opened file that its owner renews meanwhile fails when it is read.
        held: dict[str, Any] = json.loads(
            with_retries(lambda: remote.fs.cat_file(remote.path), lock)
        )
        return held

    first = json.dumps({"owner": me, "time": time.time()}).encode()
    try:
        # If-None-Match: one of us wins
        with_retries(lambda: remote.fs.pipe_file(remote.path, first, mode="create"), lock)
    except FileExistsError:
        try:
            held = holder()
        except FileNotFoundError:  # given back since
            held = {"time": time.time()}
        # Ours where the answer to the first attempt was lost on its way.
        if held.get("owner") != me and time.time() - held["time"] < _LEASE:
            raise _in_use(folder, setting) from None
        renew()
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(renew_every):
            with suppress(RunError):  # the job's own writes say it
                renew()

    keeper = threading.Thread(target=keep, daemon=True, name="lease")
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        # Where the store has not answered since, the lease runs out by itself.
        with suppress(FileNotFoundError, RunError):
            if holder().get("owner") == me:
                with_retries(lock.unlink, lock)
