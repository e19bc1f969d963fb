"""Who holds a folder, on a disk and on a real S3 server in this process."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.storage import locks
from pipelines.storage.files import as_path, write_atomically
from pipelines.storage.locks import exclusive
from vlv_model.errors import RunError


def test_a_folder_is_held_by_one_and_free_again(folder: Path) -> None:
    again = exclusive(folder, "data.output")
    with exclusive(folder, "data.output"), pytest.raises(RunError, match="in use"), again:
        raise AssertionError("two hold it")
    with exclusive(folder, "data.output"):
        pass


def test_what_killed_writers_left_half_written_is_removed(tmp_path: Path) -> None:
    half = tmp_path / f"t/_commits/.000016.json.{'0f' * 16}"
    others = [tmp_path / "t" / name for name in (".keep", "a.parquet", f"{'0f' * 16}")]
    for file in (half, *others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    with exclusive(tmp_path / "t", "data.output"):
        assert not half.exists()
        half.write_text("of a worker that is killed while the job goes on")
    assert not half.exists()
    assert all(file.exists() for file in others)


def test_an_abandoned_lease_is_taken_over(bucket: str) -> None:
    folder = as_path(f"{bucket}/t")
    lock = folder / locks.LOCK_FILE
    write_atomically(lock, json.dumps({"owner": "gone", "time": time.time() - 1000}))
    with exclusive(folder, "data.output"):
        assert json.loads(lock.read_text())["owner"] != "gone"
    assert not lock.exists()


def test_leases_are_renewed(bucket: str) -> None:
    folder = as_path(f"{bucket}/t")
    lock: Any = folder / locks.LOCK_FILE

    def noted() -> float:
        return float(json.loads(lock.fs.cat_file(lock.path))["time"])

    with exclusive(folder, "data.output", renew_every=0.05):
        first = noted()
        waited = threading.Event()
        for _ in range(100):
            waited.wait(0.05)
            if noted() > first:
                return
    raise AssertionError("the lease was never renewed")


def test_a_lease_whose_answer_was_lost_is_ours(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is there, but the line broke before the store could say so."""
    folder = as_path(f"{bucket}/t")
    remote: Any = folder
    # The instance is patched, not the class: s3fs gives each instance its own `pipe_file`.
    store, puts = remote.fs, []
    put = store.pipe_file

    def lost_once(path: str, data: bytes, **options: Any) -> None:
        put(path, data, **options)
        puts.append(path)
        if len(puts) == 1:
            raise OSError("the connection was reset")

    monkeypatch.setattr(store, "pipe_file", lost_once)
    again = exclusive(folder, "data.output")
    with exclusive(folder, "data.output"), pytest.raises(RunError, match="in use"), again:
        raise AssertionError("two hold it")
    assert len(puts) == 1  # later ones were refused: the first had arrived
    assert not (folder / locks.LOCK_FILE).exists()
