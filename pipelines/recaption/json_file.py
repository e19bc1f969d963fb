"""`format=json`: `captions.json`, the one object `{"file name": "caption"}` of the published
implementation, beside the table.

Written row by row. A caption's name is the last part of the image's name; of images that share it
the whole name, and where they share that, too, the name and the key. Images without a caption are
not in it: the table says why.
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
    """Write the file of a finished table, whole or not at all; memory: 16 bytes for each row."""
    write_pieces(table.folder / FILE, _pieces(table))


def _pieces(table: Table) -> Iterator[bytes]:
    chunks = [commit.chunk for commit in table.commits()]
    parts = [np.zeros((0, 2), np.int64)]
    for rows in table.columns(chunks, ["name", "status"]):
        pairs = [(key_of(_last(name)), key_of(name)) for name in _ok(rows, "name")]
        parts.append(np.array(pairs, np.int64).reshape(-1, 2))
    hashes = np.concatenate(parts)
    last, whole = (frozenset(_shared(column)) for column in hashes.T)
    start = b"{"
    for rows in table.columns(chunks, ["key", "name", "caption", "status"]):
        columns = (_ok(rows, name) for name in ("key", "name", "caption"))
        for key, name, caption in zip(*columns, strict=True):
            shown = _last(name)
            if key_of(shown) in last:
                shown = name if key_of(name) not in whole else f"{name}#{key}"
            pair = (json.dumps(text, ensure_ascii=False) for text in (shown, caption))
            yield start + b"\n" + ": ".join(pair).encode()
            start = b","
    yield b"\n}\n" if start == b"," else b"{}\n"


def _ok(rows: pa.Table, column: str) -> list[Any]:
    pairs = zip(rows[column].to_pylist(), rows["status"].to_pylist(), strict=True)
    return [value for value, status in pairs if status == OK]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _shared(hashes: np.ndarray) -> list[int]:
    """Those that occur more than once."""
    ordered = np.sort(hashes)
    found: list[int] = np.unique(ordered[1:][ordered[1:] == ordered[:-1]]).tolist()
    return found
