"""Synthetic lists of URLs in LAION's format, of any length.

A row depends only on the seed and its number. One URL in a hundred is a repeat, some need
normalisation, and two columns are ones that no job reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Order = Literal["random", "score"]

ROWS_PER_FILE = 1_000_000
_BATCH = 100_000
_HOSTS = 50_000
_REPEATED = 0.01
_WORDS = 9  # per text


def write_list(
    folder: Path,
    rows: int,
    order: Order = "random",
    group_rows: int = 100_000,
    seed: int = 0,
    rows_per_file: int = ROWS_PER_FILE,
) -> Path:
    """Write a folder of Parquet files with `rows` rows in total, unless it exists; returns it.

    `order="score"` sorts every file by AESTHETIC_SCORE, descending.
    """
    if (folder / "_made").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, rows, rows_per_file)):
        end = min(rows, start + rows_per_file)
        batches = (_batch(i, min(end, i + _BATCH), seed) for i in range(start, end, _BATCH))
        if order == "score":
            whole = pa.concat_tables(batches).sort_by([("AESTHETIC_SCORE", "descending")])
            batches = (whole.slice(i, group_rows) for i in range(0, whole.num_rows, group_rows))
        _write(folder / f"part-{number:05d}.parquet", batches, group_rows)
    (folder / "_made").touch()
    return folder


def _write(file: Path, batches: Iterator[pa.Table], group_rows: int) -> None:
    first = next(batches)
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for batch in chain([first], batches):
            writer.write_table(batch, row_group_size=group_rows)


def _batch(start: int, end: int, seed: int) -> pa.Table:
    """Rows [start, end) of a list."""
    rng = np.random.default_rng([seed, start])
    count = end - start
    rows = np.arange(start, end, dtype=np.uint64)
    repeated = rng.random(count) < _REPEATED
    rows[repeated] = rng.integers(0, end, repeated.sum(), dtype=np.uint64)
    mixed = (rows + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    short = rng.integers(100, 1600, count)
    aspect = rng.lognormal(0.2, 0.35, count)
    return pa.table(
        {
            "URL": _urls(mixed),
            "TEXT": _texts(rng, count),
            "WIDTH": np.round(short * aspect),
            "HEIGHT": short.astype(np.float64),
            "similarity": rng.normal(0.33, 0.03, count),
            "LANGUAGE": pa.array(["en"] * count),
            "punsafe": rng.beta(0.3, 4, count).astype(np.float32),
            "pwatermark": rng.beta(0.6, 1.2, count).astype(np.float32),
            "AESTHETIC_SCORE": rng.normal(5.3, 0.55, count).astype(np.float32),
            "hash": mixed.view(np.int64),
            "__index_level_0__": rows.astype(np.int64),
        }
    )


def _urls(mixed: np.ndarray) -> pa.Array:
    """A URL for each number: one in 32 has upper-case letters in the host, one in 8 a query."""
    host = pa.array(mixed % np.uint64(_HOSTS)).cast(pa.string())
    odd = pa.array(mixed >> np.uint64(59) == 0)
    name = pc.if_else(odd, "https://CDN.Shop-", "https://images.shop-")
    tail = pc.if_else(pa.array(mixed >> np.uint64(61) == 0), ".jpg?w=1200&fit=crop", ".jpg")
    number = pa.array(mixed).cast(pa.string())
    return pc.binary_join_element_wise(
        name, host, ".example/media/catalog/product/", number, tail, ""
    )


def _texts(rng: np.random.Generator, count: int) -> pa.Array:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = pa.array(
        ["".join(letters[rng.integers(0, 26, size)]) for size in rng.integers(2, 10, 2_000)]
    )
    chosen = [words.take(pa.array(rng.integers(0, len(words), count))) for _ in range(_WORDS)]
    return pc.binary_join_element_wise(*chosen, " ")
