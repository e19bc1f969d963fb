"""The statistics of a run: its throughput over time, and link rot and refusals by host.

Both are files in the folder of the run:

    _runs/0003/throughput.jsonl    a line each half minute: seconds since the start, rows, ok rows
    _runs/0003/link_rot.csv        by host and status: rows of the whole table, hosts with most first
    _runs/0003/refusals.csv        by host and rule: rows of the whole table that the owner refuses
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from pipelines.execution.chunks import map_chunks
from pipelines.execution.cluster import Cluster
from pipelines.images.rows import DOWNLOAD, OK, host_of, status
from pipelines.images.runs import Run
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.parquet import open_parquet
from pipelines.storage.tables import Table

_THROUGHPUT, _LINK_ROT, _REFUSALS = "throughput.jsonl", "link_rot.csv", "refusals.csv"
_OPTED_OUT = status(DOWNLOAD, "opted_out")
_INTERVAL_SECONDS = 30.0
_MAX_HOSTS = 10_000  # in the link-rot table; the others are summed up in one
OTHERS = "(others)"


class ThroughputLog:
    """Appends the number of finished rows at intervals; a continued run continues its log."""

    def __init__(self, run: Run) -> None:
        self.file = run.folder / _THROUGHPUT
        self.lines = _lines(run)
        self.earlier = _last(self.lines)
        self.start = time.monotonic()
        self.written_at = self.start
        self.done: Mapping[str, int] = {}

    def __call__(self, done: Mapping[str, int]) -> None:
        """`done` are the rows by status that this attempt has finished so far."""
        self.done = done
        if time.monotonic() - self.written_at >= _INTERVAL_SECONDS:
            self.write()

    def write(self) -> None:
        """Append a line for the current state."""
        self.written_at = time.monotonic()
        line = {
            "seconds": round(self.earlier["seconds"] + self.written_at - self.start, 1),
            "rows": self.earlier["rows"] + sum(self.done.values()),
            "ok": self.earlier["ok"] + self.done.get(OK, 0),
        }
        self.lines.append(json.dumps(line))
        write_atomically(self.file, "\n".join(self.lines) + "\n")


def last_throughput(run: Run) -> dict[str, Any]:
    """The last line of the log: `rows` and `ok` rows in `seconds` of work, without interruptions."""
    return _last(_lines(run))


def _lines(run: Run) -> list[str]:
    file = run.folder / _THROUGHPUT
    return file.read_text().splitlines() if is_file(file) else []


def _last(lines: list[str]) -> dict[str, Any]:
    empty: dict[str, Any] = {"seconds": 0, "rows": 0, "ok": 0}
    return json.loads(lines[-1]) if lines else empty


def write_host_statistics(cluster: Cluster, table: Table, run: Run) -> None:
    """Count the rows of the whole table by host and status, and the refused ones by host and rule."""
    counts: Counter[tuple[str, str]] = Counter()
    refusals: Counter[tuple[str, str]] = Counter()
    for block in map_chunks(cluster, [c.chunk for c in table.commits()], _CountByHost(table)):
        for host, state, rule, rows in zip(
            *(block[name].to_pylist() for name in _COUNTED_ROW.names), strict=True
        ):
            counts[host, state] += rows
            if state == _OPTED_OUT:
                refusals[host, rule] += rows
    failed: Counter[tuple[str, str]] = Counter()
    for (host, state), rows in counts.items():
        failed[host, state] += rows if state.startswith(DOWNLOAD) else 0
    _write(run.folder / _LINK_ROT, _LINK_ROT_ROW, counts, failed)
    _write(run.folder / _REFUSALS, _REFUSALS_ROW, refusals, refusals)


def _write(
    file: Path,
    schema: pa.Schema,
    counts: Mapping[tuple[str, str], int],
    weights: Mapping[tuple[str, str], int],
) -> None:
    """Write rows by host and another column; the hosts with the largest weights first, others summed up."""
    by_host: Counter[str] = Counter()
    for (host, _), rows in weights.items():
        by_host[host] += rows
    ranked = sorted(by_host, key=lambda host: (-by_host[host], host))
    rank = {host: n for n, host in enumerate(ranked[:_MAX_HOSTS])}
    merged: Counter[tuple[str, str]] = Counter()
    for (host, name), rows in counts.items():
        merged[host if host in rank else OTHERS, name] += rows
    ordered = sorted(merged.items(), key=lambda i: (rank.get(i[0][0], len(rank)), -i[1], i[0]))
    lines = [dict(zip(schema.names, (*names, rows), strict=True)) for names, rows in ordered]
    content = io.BytesIO()
    csv.write_csv(pa.Table.from_pylist(lines, schema), content)
    write_atomically(file, content.getvalue())


def read_link_rot(run: Run) -> list[dict[str, Any]]:
    """The lines (`host`, `status`, `rows`) of `link_rot.csv`; empty if the file does not exist."""
    return _read(run.folder / _LINK_ROT, _LINK_ROT_ROW)


def read_refusals(run: Run) -> list[dict[str, Any]]:
    """The lines (`host`, `rule`, `rows`) of `refusals.csv`; empty if the file does not exist."""
    return _read(run.folder / _REFUSALS, _REFUSALS_ROW)


def _read(file: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    if not is_file(file):
        return []
    types = csv.ConvertOptions(column_types=schema, strings_can_be_null=False)
    return csv.read_csv(io.BytesIO(file.read_bytes()), convert_options=types).to_pylist()


_LINK_ROT_ROW = pa.schema([("host", pa.string()), ("status", pa.string()), ("rows", pa.int64())])
_REFUSALS_ROW = pa.schema([("host", pa.string()), ("rule", pa.string()), ("rows", pa.int64())])
_COUNTED_ROW = pa.schema(
    [
        ("host", pa.string()),
        ("status", pa.string()),
        ("rule", pa.string()),
        ("rows", pa.int64()),
    ]
)


class _CountByHost:
    """Counts the rows of a chunk by host and status, and for refused ones by rule."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(self, chunk: int) -> pa.Table:
        with open_parquet(self.table.part(chunk)) as parquet:
            rows = parquet.read(columns=["url", "status", "error"])
        is_refused = pc.equal(rows["status"], _OPTED_OUT)
        errors = pc.if_else(is_refused, rows["error"], "")
        rules = [(error or "").partition(":")[0] for error in errors.to_pylist()]
        hosts = map(host_of, rows["url"].to_pylist())
        counts = Counter(zip(hosts, rows["status"].to_pylist(), rules, strict=True))
        return pa.Table.from_pylist(
            [
                {"host": host, "status": state, "rule": rule, "rows": n}
                for (host, state, rule), n in counts.items()
            ],
            _COUNTED_ROW,
        )
