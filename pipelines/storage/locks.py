"""Locks on folders: a file lock on a disk, a lease in an object store."""

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

from pipelines.storage.files import is_url, remove_temporary_files, with_retries
from pipelines.storage.folders import make_folder
from vlv_model.errors import RunError

LOCK_FILE = ".lock"
_LEASE_SECONDS = 120.0  # a lease that was not renewed for this long is abandoned
_RENEW_SECONDS = 30.0


@contextmanager
def lock_folder(folder: Path, setting: str, renew_every: float = _RENEW_SECONDS) -> Iterator[None]:
    """Lock a folder for this process; RunError while another process holds the lock.

    On a disk the lock ends with the process and holds on one machine only. Temporary files of killed
    writers are removed when the lock is taken (an earlier job's) and released (those of workers that
    this process outlived). In an object store the lock is a lease file, renewed every `renew_every`
    seconds; a lease that was not renewed for two minutes is taken over.
    """
    make_folder(folder, setting)
    lock = _lease(folder, setting, renew_every) if is_url(folder) else _file_lock(folder, setting)
    with lock:
        yield


def _in_use(folder: Path, setting: str) -> RunError:
    return RunError(
        f"{setting}={folder} is in use by a job that is still going: wait until it ends"
    )


@contextmanager
def _file_lock(folder: Path, setting: str) -> Iterator[None]:
    with open(folder / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _in_use(folder, setting) from None
        remove_temporary_files(folder)
        try:
            yield
        finally:
            remove_temporary_files(folder)


@contextmanager
def _lease(folder: Path, setting: str, renew_every: float) -> Iterator[None]:
    lock, me = folder / LOCK_FILE, f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    remote: Any = lock

    def content() -> str:
        return json.dumps({"owner": me, "time": time.time()})

    def renew() -> None:
        with_retries(lambda: lock.write_text(content()), lock)

    def read_lease() -> dict[str, Any]:
        # In one request: reading an open file fails if its owner renews it meanwhile.
        lease: dict[str, Any] = json.loads(
            with_retries(lambda: remote.fs.cat_file(remote.path), lock)
        )
        return lease

    first = content().encode()
    try:
        # `create` sends If-None-Match: of several processes one succeeds.
        with_retries(lambda: remote.fs.pipe_file(remote.path, first, mode="create"), lock)
    except FileExistsError:
        try:
            lease = read_lease()
        except FileNotFoundError:  # released since
            lease = {"time": time.time()}
        # The lease is ours if the response to the first attempt was lost.
        if lease.get("owner") != me and time.time() - lease["time"] < _LEASE_SECONDS:
            raise _in_use(folder, setting) from None
        renew()
    stop = threading.Event()

    def keep_renewing() -> None:
        while not stop.wait(renew_every):
            with suppress(RunError):  # the job's own writes report a store that fails
                renew()

    renewer = threading.Thread(target=keep_renewing, daemon=True, name="lease")
    renewer.start()
    try:
        yield
    finally:
        stop.set()
        renewer.join()
        # If the store has stopped answering, the lease expires by itself.
        with suppress(FileNotFoundError, RunError):
            if read_lease().get("owner") == me:
                with_retries(lock.unlink, lock)
