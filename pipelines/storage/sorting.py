"""Sorting more rows by key than memory holds.

Keys are hashes and so evenly spread: their range is cut into buckets of a few ten thousand rows,
which wait on disk and are sorted in memory one by one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.storage.files import refuse_full

_BUCKET_BYTES = 16 << 20  # of input behind one bucket
_MAX_BUCKETS = 512  # each is an open file while rows are added
_WAITING_ROWS = 100_000  # rows in memory before they are written to their buckets
_LEAST, _KEYS = -(2**63), 2**64


class Buckets:
    """Rows of one schema with an int64 `key`, on disk, apart by ranges of their key."""

    def __init__(
        self,
        schema: pa.Schema,
        input_bytes: int,
        bucket_bytes: int = _BUCKET_BYTES,
        waiting_rows: int = _WAITING_ROWS,
    ) -> None:
        """`input_bytes`, the size of what the rows are made from, sets the number of buckets: one
        for each `bucket_bytes`. `waiting_rows` are in memory before they are written.
        """
        # On this machine's disk (TMPDIR), wherever the table is.
        self._folder = tempfile.TemporaryDirectory(prefix="vlv-sort-")
        count = min(_MAX_BUCKETS, 1 + input_bytes // bucket_bytes)
        self.starts = np.array([_LEAST + _KEYS // count * i for i in range(count)], np.int64)
        self._files = [pa.OSFile(str(self._file(i)), "wb") for i in range(count)]
        self._streams = [pa.ipc.new_stream(file, schema) for file in self._files]
        self._waiting: list[pa.Table] = []
        self._num_waiting, self._most_waiting = 0, waiting_rows

    def add(self, rows: pa.Table) -> None:
        """Take rows in; those of one key come out in the order in which they were added."""
        self._waiting.append(rows)
        self._num_waiting += rows.num_rows
        if self._num_waiting >= self._most_waiting:
            self._flush()

    def sorted(self) -> Iterator[pa.Table]:
        """The buckets in the order of their ranges (`starts`), each sorted by key; ends adding."""
        self._flush()
        for stream, file in zip(self._streams, self._files, strict=True):
            stream.close()
            file.close()
        for i in range(len(self.starts)):
            with pa.memory_map(str(self._file(i))) as source:
                yield _sort(pa.ipc.open_stream(source).read_all())

    def remove(self) -> None:
        """Delete what lies on disk."""
        self._folder.cleanup()

    def _file(self, bucket: int) -> Path:
        return Path(self._folder.name, f"{bucket:04d}.arrow")

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = _sort(pa.concat_tables(self._waiting))
        self._waiting, self._num_waiting = [], 0
        starts = np.searchsorted(rows["key"].to_numpy(), self.starts).tolist()
        ends = [*starts[1:], rows.num_rows]
        try:
            for stream, start, end in zip(self._streams, starts, ends, strict=True):
                stream.write_table(rows.slice(start, end - start))
        except OSError as error:
            refuse_full(error, f"{self._folder.name} (temporary files, where TMPDIR says)")
            raise


def _sort(rows: pa.Table) -> pa.Table:
    order = np.argsort(rows["key"].to_numpy(), kind="stable")
    return rows.take(pa.array(order)).combine_chunks()


Sorting = Callable[[pa.Schema, int], Buckets]
"""How buckets are made, of a schema and `input_bytes`."""
