"""Locks on folders, on a disk and on a real S3 server in this process."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage import locks
from pipelines.storage.files import as_path, write_atomically
from pipelines.storage.locks import lock_folder
from vlv_model.errors import RunError


def test_folder_is_locked_once_and_then_released(folder: Path) -> None:
    again = lock_folder(folder, "data.output")
    with lock_folder(folder, "data.output"), pytest.raises(RunError, match="in use"), again:
        raise AssertionError("locked twice")
    with lock_folder(folder, "data.output"):
        pass


def test_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    temporary = tmp_path / f"t/_commits/.000016.json.{'0f' * 16}"
    others = [tmp_path / "t" / name for name in (".keep", "a.parquet", f"{'0f' * 16}")]
    for file in (temporary, *others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    with lock_folder(tmp_path / "t", "data.output"):
        assert not temporary.exists()
        temporary.write_text("of a worker killed during the job")
    assert not temporary.exists()
    assert all(file.exists() for file in others)


def test_abandoned_lease_is_taken_over(bucket: str) -> None:
    folder = as_path(f"{bucket}/t")
    lock = folder / locks.LOCK_FILE
    write_atomically(lock, json.dumps({"owner": "gone", "time": time.time() - 1000}))
    with lock_folder(folder, "data.output"):
        assert json.loads(lock.read_text())["owner"] != "gone"
    assert not lock.exists()


def test_leases_are_renewed(bucket: str) -> None:
    folder = as_path(f"{bucket}/t")
    lock: Any = folder / locks.LOCK_FILE

    def lease_time() -> float:
        return float(json.loads(lock.fs.cat_file(lock.path))["time"])

    with lock_folder(folder, "data.output", renew_every=0.05):
        first = lease_time()
        event = threading.Event()
        for _ in range(100):
            event.wait(0.05)
            if lease_time() > first:
                return
    raise AssertionError("the lease was never renewed")


def test_lease_is_ours_if_only_the_response_was_lost(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store wrote the lock, but the connection broke before it responded."""
    folder = as_path(f"{bucket}/t")
    remote: Any = folder
    # Patch the instance: s3fs gives each instance its own `pipe_file`.
    store, puts = remote.fs, []
    put = store.pipe_file

    def lost_once(path: str, data: bytes, **options: Any) -> None:
        put(path, data, **options)
        puts.append(path)
        if len(puts) == 1:
            raise OSError("the connection was reset")

    monkeypatch.setattr(store, "pipe_file", lost_once)
    again = lock_folder(folder, "data.output")
    with lock_folder(folder, "data.output"), pytest.raises(RunError, match="in use"), again:
        raise AssertionError("locked twice")
    assert len(puts) == 1  # later ones were refused because the first had arrived
    assert not (folder / locks.LOCK_FILE).exists()
