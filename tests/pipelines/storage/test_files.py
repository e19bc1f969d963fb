"""Paths and URLs behave the same, on a disk and on a real S3 server in this process."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from benchmarks.faults.kinds import FlakyProxy
from pipelines.images.sources import walk
from pipelines.storage import files
from pipelines.storage.files import as_path, with_retries, write_atomically
from pipelines.storage.folders import (
    files_below,
    is_folder,
    make_folder,
    matching_files,
    names_in,
    remove_folder,
)
from pipelines.storage.locks import lock_folder
from pipelines.storage.parquet import open_parquet, read_parquet_file, read_rows, write_parquet
from pipelines.storage.tables import Table, parquet_files
from vlv_model.errors import DataError, RunError

ROWS = pa.table({"key": [1, 2, 3], "status": ["ok", "ok", "download:dns"]})


def test_files_are_written_and_read_the_same_way(folder: Path) -> None:
    make_folder(folder, "data.output")
    write_atomically(folder / "x.json", "{}")
    write_parquet(folder / "x.parquet", ROWS, row_group_size=2)
    assert (folder / "x.json").read_text() == "{}"
    assert read_parquet_file(folder / "x.parquet").equals(ROWS)
    with open_parquet(pickle.loads(pickle.dumps(folder)) / "x.parquet") as parquet:
        assert parquet.read_row_group(1)["key"].to_pylist() == [3]
    assert [p.name for p in matching_files(f"{folder}/*.parquet")] == ["x.parquet"]
    assert [p.name for p in matching_files(f"{str(folder)[:-1]}*/x.*")] == ["x.json", "x.parquet"]
    for hidden in ("_plan/rows.parquet", "c/_runs/1/y.parquet", ".git/z.parquet", "c/.w.parquet"):
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / hidden, b"")
    assert [p.name for p in matching_files(f"{folder}/**/*.parquet")] == ["x.parquet"]
    assert [p.name for p in matching_files(f"{folder}/*/*.parquet")] == []
    assert [p.name for p in matching_files(f"{folder}/_plan/*.parquet")] == ["rows.parquet"]
    for hidden in ("_plan", "c", ".git"):
        remove_folder(folder / hidden)
    assert sorted(p.name for p in folder.iterdir()) == ["x.json", "x.parquet"]
    remove_folder(folder)
    assert not folder.exists()
    remove_folder(folder)  # a second removal does nothing


def test_missing_bucket_is_a_one_line_error(s3_server: str) -> None:
    with pytest.raises(RunError, match=r"data\.output=s3://no-such-bucket/t: there is no such"):
        make_folder(as_path("s3://no-such-bucket/t"), "data.output")


def test_files_of_another_process_are_listed(folder: Path) -> None:
    make_folder(folder, "data.output")
    write_atomically(folder / "one", "1")
    assert len(list(folder.glob("*"))) == 1
    write_atomically(as_path(str(folder)) / "two", "2")
    assert len(list(folder.glob("*"))) == 2


class Keys(encryption.KmsClient):
    def __init__(self) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return b64encode(key)


@pytest.mark.parametrize("plain", [True, False], ids=["plain footer", "encrypted footer"])
def test_encrypted_file_is_a_one_line_error(folder: Path, plain: bool, tmp_path: Path) -> None:
    """With a plain-text footer Arrow terminates the process when the statistics are read."""
    config = encryption.EncryptionConfiguration(
        footer_key="a", column_keys={"b": ["key"]}, plaintext_footer=plain
    )
    keys = encryption.CryptoFactory(lambda _: Keys()).file_encryption_properties(
        encryption.KmsConnectionConfig(), config
    )
    with pq.ParquetWriter(tmp_path / "x", ROWS.schema, encryption_properties=keys) as writer:
        writer.write_table(ROWS)
    make_folder(folder, "data.output")
    write_atomically(folder / "x.parquet", (tmp_path / "x").read_bytes())
    refused = pytest.raises(DataError, match=r"x\.parquet .*encrypted")
    with refused, open_parquet(folder / "x.parquet") as parquet:
        parquet.metadata.row_group(0).column(0)


def test_damaged_file_is_a_one_line_error_that_names_it(folder: Path) -> None:
    make_folder(folder, "data.output")
    write_atomically(folder / "x.parquet", b"PAR1 and no more")
    with pytest.raises(DataError, match=r"x\.parquet is not a readable Parquet file"):
        read_parquet_file(folder / "x.parquet")


def test_table_on_a_disk_or_in_a_store(folder: Path) -> None:
    table = Table(str(folder))
    assert not table.check_same_run("image", {"a": 1})
    table.create("image", {"a": 1}, 3)
    table.write(2, ROWS)
    table.write(0, ROWS)
    with pytest.raises(DataError, match="not finished"):
        parquet_files(str(folder))
    again = Table(str(folder))
    assert again.check_same_run("image", {"a": 1})
    assert again.pending() == [1]
    again.write(1, ROWS)
    again.write(1, ROWS)  # changes nothing
    assert again.counts() == {"ok": 6, "download:dns": 3}
    assert len(list(read_rows(parquet_files(str(folder)), ["key"]))) == 9
    with pytest.raises(RunError, match="a: 1 there, 2 here"):
        again.check_same_run("image", {"a": 2})


def test_folder_with_other_files_is_refused(folder: Path) -> None:
    make_folder(folder, "data.output")
    write_atomically(folder / "thesis.txt", "precious")
    with pytest.raises(RunError, match=r"not empty.*thesis"):
        Table(str(folder)).check_same_run("image", {})


def test_requests_are_retried_while_the_store_fails(bucket: str) -> None:
    path, calls = as_path(f"{bucket}/x"), []

    def fails_three_times() -> str:
        calls.append(1)
        if len(calls) <= 3:
            raise OSError("SlowDown")
        return "done"

    assert with_retries(fails_three_times, path, pauses=(0.01,) * 4) == "done"
    assert len(calls) == 4
    with pytest.raises(FileNotFoundError):  # never retried
        with_retries(lambda: path.read_bytes(), path)


def test_failed_write_on_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    target = tmp_path / "x"
    (tmp_path / "before").write_text("")

    def write() -> None:
        write_atomically(target, "x" * 100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", lambda *a, **k: full.open("wb", buffering=0))
        with pytest.raises(OSError, match="No space left"):
            write()
        with pytest.raises(
            RunError, match=rf"^{target} cannot be written: No space left on device: "
        ):
            write()
    assert [p.name for p in tmp_path.iterdir()] == ["before"]


def test_full_disk_error_of_parquet_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "Error writing bytes to file")  # Arrow's message

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(
        RunError, match=r"/part\.parquet cannot be written: No space left on device"
    ):
        write_parquet(tmp_path / "part.parquet", ROWS)


def test_unreachable_store_is_not_taken_for_an_empty_one(
    bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a job would create a new table over the existing one."""
    import s3fs

    monkeypatch.setattr(files, "PAUSES", (0.01,))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    line = FlakyProxy(int(s3_server.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        folder = as_path(f"{bucket}/t")
        table = Table(folder)
        table.create("image", {"a": 1}, 1)
        table.write(0, ROWS)
        requests: list[Callable[[], Any]] = [
            lambda: table.exists,
            table.pending,
            lambda: table.check_same_run("image", {"a": 1}),
            lambda: parquet_files(str(folder)),
            lambda: files_below(folder),
            lambda: names_in(folder),
            lambda: is_folder(folder),
            lambda: matching_files(f"{folder}/part-*.parquet"),
            lambda: matching_files(f"{folder}/**"),
            lambda: list(walk(folder)),
            lambda: read_parquet_file(table.part(0)),
            lambda: remove_folder(folder),
        ]
        line.turn("refuses")
        for request in requests:
            with pytest.raises(RunError, match="the store does not answer"):
                request()
        with pytest.raises(RunError, match="does not answer"), lock_folder(folder, "data.output"):
            raise AssertionError("locked without a store")
        line.turn("passes")
        assert table.pending() == []
        for request in requests:
            request()
        assert files_below(folder) == []
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", ["mine", "mine/not/yet"])
def test_folder_of_another_user_is_refused_and_both_are_named(name: str) -> None:
    """A new shared disk belongs to root; the container runs as another user."""
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    program = (
        "import os, pathlib, sys; from pipelines.storage.folders import make_folder; os.setuid(4321); "
        "make_folder(pathlib.Path(sys.argv[1]), 'run_dir')"
    )
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # pytest's own folders are hidden from other users
        Path(folder).chmod(0o755)
        Path(folder, "mine").mkdir(mode=0o755)
        process = subprocess.run(
            [sys.executable, "-c", program, f"{folder}/{name}"], capture_output=True, text=True
        )
    last = process.stderr.splitlines()[-1]
    assert f"RunError: run_dir={folder}/{name} cannot be written: {folder}/mine belongs" in last
    assert "belongs to user 0, and this job runs as user 4321" in last
