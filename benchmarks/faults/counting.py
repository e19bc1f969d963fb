"""Counts the rows of a table of ours with pyarrow and the layout that pipelines/storage/tables.py tells.

Nothing of our code is used here: what reads a table for the benchmark of faults must not share a
mistake with what wrote it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Count:
    """How a table stands against what it was made from, in rows unless said otherwise."""

    rows: int  # that the input has
    lost: int = 0  # of the input, not in the table
    doubled: int = 0  # in the table more than once
    strange: int = 0  # in the table, not in the input
    differing: int = 0  # with other content than the same row of the unbroken run
    damaged: tuple[str, ...] = ()  # what a commit and its part disagree on
    left_behind: int = 0  # temporary files

    @property
    def is_right(self) -> bool:
        wrong = self.lost + self.doubled + self.strange + self.differing + self.left_behind
        return not wrong and not self.damaged

    def figures(self) -> dict[str, Any]:
        """What goes into the last line of a benchmark."""
        return {
            "rows": self.rows,
            "rows_lost": self.lost,
            "rows_doubled": self.doubled,
            "rows_differing": self.differing + self.strange,
            "damaged_parts": len(self.damaged),
            "files_left_behind": self.left_behind,
        }


def count(table: Path, unbroken: Path, column: str, expected: Iterable[Any]) -> Count:
    """Hold a finished table against its input's values of `column` and against an unbroken run."""
    rows, damaged = committed(table)
    there = Counter(rows[column].to_pylist())
    listed = set(expected)
    whole, _ = committed(unbroken)
    pairs = zip(_by(rows, column), _by(whole, column), strict=False)
    differing = sum(mine != theirs for mine, theirs in pairs) if rows.num_rows else 0
    return Count(
        rows=len(listed),
        lost=len(listed - set(there)),
        doubled=sum(n - 1 for n in there.values()),
        strange=len(set(there) - listed),
        differing=differing,
        damaged=tuple(damaged),
        left_behind=sum(_is_temporary(file) for file in table.rglob(".*")),
    )


def _is_temporary(file: Path) -> bool:
    return file.is_file() and file.name != ".lock"


def _by(rows: pa.Table, column: str) -> list[dict[str, Any]]:
    """Rows in the order of a column, without the number of the run that wrote them."""
    columns = [name for name in rows.column_names if name != "run"]
    return rows.select(columns).sort_by(column).to_pylist()


def committed(table: Path) -> tuple[pa.Table, list[str]]:
    """The rows of all committed parts, and what is not as the commits tell."""
    about = json.loads((table / "_table.json").read_text())
    folder = table / about.get("parts", "")
    parts, damaged = [], []
    told = {}
    for file in sorted((table / "_commits").glob("*.json")):
        commit = json.loads(file.read_text())
        told[commit["chunk"]] = commit
    if missing := set(range(about["chunks"])) - set(told):
        damaged.append(f"{len(missing)} chunks are not committed")
    for chunk, commit in sorted(told.items()):
        part = pq.read_table(folder / f"part-{chunk:06d}.parquet")
        if dict(Counter(part["status"].to_pylist())) != commit["statuses"]:
            damaged.append(f"part {chunk} has other statuses than its commit")
        parts.append(part)
    if len(list(folder.glob("*.parquet"))) != len(parts):
        damaged.append("there are parts without a commit")
    return pa.concat_tables(parts), damaged


def look(table: Path) -> str | None:
    """What a reader that takes every part it sees finds wrong at this moment; None: nothing."""
    keys: Counter[int] = Counter()
    for part in sorted([*table.glob("*.parquet"), *table.glob("data/*.parquet")]):
        try:
            keys.update(pq.read_table(part)["key"].to_pylist())
        except (pa.ArrowException, OSError) as error:
            return f"{part.name} cannot be read: {error}"
    doubled = sum(n > 1 for n in keys.values())
    return f"{doubled} keys are there more than once" if doubled else None
