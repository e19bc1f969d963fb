"""Writes `captions.json`, the object `{"file name": "caption"}` of the published implementation.

A caption is named by the last part of its image's name. If images share that, it is the whole name; if
they share the whole name, name and key. Images without a caption are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.images.rows import OK, key_of
from pipelines.storage.files import write_pieces
from pipelines.storage.tables import Table

FILE = "captions.json"


def write_json(table: Table) -> None:
    """Write the file of a finished table atomically; needs 16 bytes of memory per row."""
    write_pieces(table.folder / FILE, _pieces(table))


def _pieces(table: Table) -> Iterator[bytes]:
    chunks = [commit.chunk for commit in table.commits()]
    parts = [np.zeros((0, 2), np.int64)]
    for rows in table.columns(chunks, ["name", "status"]):
        pairs = [(key_of(_last(name)), key_of(name)) for name in _ok(rows, "name")]
        parts.append(np.array(pairs, np.int64).reshape(-1, 2))
    hashes = np.concatenate(parts)
    repeated_last, repeated_whole = (frozenset(_repeated(column)) for column in hashes.T)
    start = b"{"
    for rows in table.columns(chunks, ["key", "name", "caption", "status"]):
        columns = (_ok(rows, name) for name in ("key", "name", "caption"))
        for key, name, caption in zip(*columns, strict=True):
            unique = _last(name)
            if key_of(unique) in repeated_last:
                unique = name if key_of(name) not in repeated_whole else f"{name}#{key}"
            pair = (json.dumps(text, ensure_ascii=False) for text in (unique, caption))
            yield start + b"\n" + ": ".join(pair).encode()
            start = b","
    yield b"\n}\n" if start == b"," else b"{}\n"


def _ok(rows: pa.Table, column: str) -> list[Any]:
    pairs = zip(rows[column].to_pylist(), rows["status"].to_pylist(), strict=True)
    return [value for value, status in pairs if status == OK]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _repeated(hashes: np.ndarray) -> list[int]:
    """The hashes that occur more than once."""
    ordered = np.sort(hashes)
    repeated: list[int] = np.unique(ordered[1:][ordered[1:] == ordered[:-1]]).tolist()
    return repeated
