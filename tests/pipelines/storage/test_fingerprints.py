"""Fingerprints of files. Existing tables store them, so their values must not change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.storage.fingerprints import (
    content_fingerprint,
    mtime_fingerprint,
    size_fingerprint,
)

CONTENT = {"a.csv": "4 bytes, d4dd416254efb840", "b/c.csv": "8 bytes, 3ac4c664a8113ed0"}
SIZE = "e9c8eed2285862fd"
MTIME = "7b498f040c56bfd1"


def test_values_are_those_in_existing_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [Path("list/a.csv"), Path("list/b/c.csv")]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True)
        file.write_text("url\n" * (number + 1))
        os.utime(file, ns=(0, number))
    assert content_fingerprint(files) == CONTENT
    assert size_fingerprint({"a.csv": files[0], "b/c.csv": files[1]}) == SIZE
    assert mtime_fingerprint(files) == MTIME


def test_equal_size_and_other_content(tmp_path: Path) -> None:
    file = tmp_path / "l.csv"
    file.write_text("url\nhttp://127.0.0.1:4000/\n")
    before = content_fingerprint([file])
    file.write_text("url\nhttp://127.0.0.1:5000/\n")
    assert content_fingerprint([file]) != before


def test_rewritten_file_has_another_mtime_fingerprint(folder: Path) -> None:
    file = folder / "a"
    if "://" not in str(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("one")
    before = mtime_fingerprint([file])
    assert mtime_fingerprint([file]) == before
    file.write_text("two, longer")
    assert mtime_fingerprint([file]) != before
