"""External sort: sorts more rows by key than memory holds.

Keys must be evenly spread, as hashes are; `spread_keys` spreads others. Their range is split into buckets
of a few ten thousand rows. The buckets lie on disk and are sorted in memory one at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.storage.files import raise_if_full

_BUCKET_BYTES = 16 << 20  # input bytes per bucket
_MAX_BUCKETS = 512  # each is an open file while rows are added
_BUFFER_ROWS = 100_000  # rows held in memory before they are written to their buckets
_MIN_KEY, _NUM_KEYS = -(2**63), 2**64
_FACTOR = 0x9E3779B97F4A7C15  # odd, and therefore invertible modulo 2**64


class ExternalSort:
    """Sorts rows of one schema by their int64 column `key`, in buckets on disk."""

    def __init__(
        self,
        schema: pa.Schema,
        input_bytes: int,
        bucket_bytes: int = _BUCKET_BYTES,
        buffer_rows: int = _BUFFER_ROWS,
    ) -> None:
        """`input_bytes`, the size of the data behind the rows, sets the number of buckets: one for
        each `bucket_bytes`. Up to `buffer_rows` stay in memory before they are written.
        """
        # Always on this machine's disk (TMPDIR), even when the table is in an object store.
        self._folder = tempfile.TemporaryDirectory(prefix="vlv-sort-")
        count = min(_MAX_BUCKETS, 1 + input_bytes // bucket_bytes)
        self.starts = np.array([_MIN_KEY + _NUM_KEYS // count * i for i in range(count)], np.int64)
        self._files = [pa.OSFile(str(self._file(i)), "wb") for i in range(count)]
        self._streams = [pa.ipc.new_stream(file, schema) for file in self._files]
        self._buffer: list[pa.Table] = []
        self._num_buffered, self._buffer_rows = 0, buffer_rows

    def add(self, rows: pa.Table) -> None:
        """Add rows. Rows with equal keys keep the order in which they were added."""
        self._buffer.append(rows)
        self._num_buffered += rows.num_rows
        if self._num_buffered >= self._buffer_rows:
            self._flush()

    def sorted(self) -> Iterator[pa.Table]:
        """The buckets in key order (`starts` are their lower bounds), each sorted by key.

        No rows can be added afterwards.
        """
        self._flush()
        for stream, file in zip(self._streams, self._files, strict=True):
            stream.close()
            file.close()
        for i in range(len(self.starts)):
            with pa.memory_map(str(self._file(i))) as source:
                yield _sort(pa.ipc.open_stream(source).read_all())

    def remove(self) -> None:
        """Delete the temporary files."""
        self._folder.cleanup()

    def _file(self, bucket: int) -> Path:
        return Path(self._folder.name, f"{bucket:04d}.arrow")

    def _flush(self) -> None:
        if not self._buffer:
            return
        rows = _sort(pa.concat_tables(self._buffer))
        self._buffer, self._num_buffered = [], 0
        starts = np.searchsorted(rows["key"].to_numpy(), self.starts).tolist()
        ends = [*starts[1:], rows.num_rows]
        try:
            for stream, start, end in zip(self._streams, starts, ends, strict=True):
                stream.write_table(rows.slice(start, end - start))
        except OSError as error:
            raise_if_full(error, f"{self._folder.name} (temporary files; TMPDIR chooses the disk)")
            raise


def _sort(rows: pa.Table) -> pa.Table:
    order = np.argsort(rows["key"].to_numpy(), kind="stable")
    return rows.take(pa.array(order)).combine_chunks()


SortFactory = Callable[[pa.Schema, int], ExternalSort]
"""Makes an ExternalSort from a schema and `input_bytes`."""


def spread_keys(keys: np.ndarray) -> np.ndarray:
    """Map 64-bit keys `[n]`, one to one, to keys int64 `[n]` that are evenly spread."""
    return (keys.astype(np.uint64) * np.uint64(_FACTOR)).view(np.int64)


def original_key(key: int) -> int:
    """The int64 that `spread_keys` mapped to `key`."""
    return (key * pow(_FACTOR, -1, 2**64) + 2**63) % 2**64 - 2**63
