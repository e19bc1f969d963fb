"""What a run leaves beside the rows: its throughput over time, and where links have rotted.

Both lie in the folder of the run:

    _runs/0003/throughput.jsonl    a line each half minute: seconds since the start, rows, ok rows
    _runs/0003/link_rot.csv        by host and status: rows of the whole table, hosts with most first
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow import csv

from pipelines.execution.chunks import map_chunks
from pipelines.execution.cluster import Cluster
from pipelines.images.rows import DOWNLOAD, OK, host_of
from pipelines.images.runs import Run
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.parquet import open_parquet
from pipelines.storage.tables import Table

_THROUGHPUT, _LINK_ROT = "throughput.jsonl", "link_rot.csv"
_EVERY = 30.0  # seconds
_MOST_HOSTS = 10_000  # of the link-rot table; the others are added up as one
OTHERS = "(others)"


class Throughput:
    """Notes how many rows a run has done, from time to time; a continued run adds to its notes."""

    def __init__(self, run: Run) -> None:
        self.file = run.folder / _THROUGHPUT
        self.lines = _lines(run)
        self.before = _last(self.lines)
        self.start = time.monotonic()
        self.noted = self.start
        self.done: Mapping[str, int] = {}

    def __call__(self, done: Mapping[str, int]) -> None:
        """`done` are the rows by status that this attempt has done so far."""
        self.done = done
        if time.monotonic() - self.noted >= _EVERY:
            self.end()

    def end(self) -> None:
        """Note how things stand now."""
        self.noted = time.monotonic()
        line = {
            "seconds": round(self.before["seconds"] + self.noted - self.start, 1),
            "rows": self.before["rows"] + sum(self.done.values()),
            "ok": self.before["ok"] + self.done.get(OK, 0),
        }
        self.lines.append(json.dumps(line))
        write_atomically(self.file, "\n".join(self.lines) + "\n")


def last_throughput(run: Run) -> dict[str, Any]:
    """`seconds` that a run has worked (not those between a kill and its continuation), and what it
    has done in them: `rows`, `ok`."""
    return _last(_lines(run))


def _lines(run: Run) -> list[str]:
    file = run.folder / _THROUGHPUT
    return file.read_text().splitlines() if is_file(file) else []


def _last(lines: list[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(lines[-1]) if lines else {"seconds": 0, "rows": 0, "ok": 0}
    return told


def write_link_rot(cluster: Cluster, table: Table, run: Run) -> None:
    """Count the rows of the whole table by host and status."""
    counts: Counter[tuple[str, str]] = Counter()
    for block in map_chunks(cluster, [c.chunk for c in table.commits()], _Hosts(table)):
        for host, state, rows in zip(
            *(block[name].to_pylist() for name in _ROT.names), strict=True
        ):
            counts[host, state] += rows
    failed: Counter[str] = Counter()
    for (host, state), rows in counts.items():
        failed[host] += rows if state.startswith(DOWNLOAD) else 0
    shown = dict.fromkeys(host for host, _ in failed.most_common(_MOST_HOSTS))
    place = {host: number for number, host in enumerate(shown)}
    merged: Counter[tuple[str, str]] = Counter()
    for (host, state), rows in counts.items():
        merged[host if host in shown else OTHERS, state] += rows
    ordered = sorted(merged.items(), key=lambda i: (place.get(i[0][0], len(place)), -i[1], i[0]))
    rows_of = [{"host": host, "status": state, "rows": rows} for (host, state), rows in ordered]
    content = io.BytesIO()
    csv.write_csv(pa.Table.from_pylist(rows_of, _ROT), content)
    write_atomically(run.folder / _LINK_ROT, content.getvalue())


def read_link_rot(run: Run) -> list[dict[str, Any]]:
    """The lines (`host`, `status`, `rows`) that `write_link_rot` left; none where it did not."""
    file = run.folder / _LINK_ROT
    if not is_file(file):
        return []
    types = csv.ConvertOptions(column_types=_ROT, strings_can_be_null=False)
    return csv.read_csv(io.BytesIO(file.read_bytes()), convert_options=types).to_pylist()


_ROT = pa.schema([("host", pa.string()), ("status", pa.string()), ("rows", pa.int64())])


class _Hosts:
    """Rows of a chunk by host and status."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(self, chunks: pa.Table) -> pa.Table:
        (chunk,) = chunks["chunk"].to_pylist()
        with open_parquet(self.table.part(chunk)) as parquet:
            rows = parquet.read(columns=["url", "status"])
        counts = Counter(
            zip(map(host_of, rows["url"].to_pylist()), rows["status"].to_pylist(), strict=True)
        )
        return pa.Table.from_pylist(
            [{"host": host, "status": state, "rows": n} for (host, state), n in counts.items()],
            _ROT,
        )
