"""Counts the rows of a table with pyarrow alone, by the layout in pipelines/storage/tables.py.

It imports no code of the pipeline, so that the check cannot share a bug with the writer.
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
    """A table compared with its input: numbers of rows, unless noted."""

    rows: int  # in the input
    lost: int = 0  # in the input, not in the table
    doubled: int = 0  # extra copies in the table
    strange: int = 0  # in the table, not in the input
    differing: int = 0  # with other content than in the undisturbed run
    damaged: tuple[str, ...] = ()  # contradictions between commits and parts
    left_behind: int = 0  # number of temporary files

    @property
    def is_right(self) -> bool:
        wrong = self.lost + self.doubled + self.strange + self.differing + self.left_behind
        return not wrong and not self.damaged

    def figures(self) -> dict[str, Any]:
        """The figures for a benchmark's JSON line."""
        return {
            "rows": self.rows,
            "rows_lost": self.lost,
            "rows_doubled": self.doubled,
            "rows_differing": self.differing + self.strange,
            "damaged_parts": len(self.damaged),
            "files_left_behind": self.left_behind,
        }


def count(table: Path, undisturbed: Path, column: str, expected: Iterable[Any]) -> Count:
    """Compare a finished table with its input (values of `column`) and with an undisturbed run's."""
    rows, damaged = committed(table)
    counts = Counter(rows[column].to_pylist())
    inputs = set(expected)
    reference, _ = committed(undisturbed)
    pairs = zip(_sorted_rows(rows, column), _sorted_rows(reference, column), strict=False)
    differing = sum(row != other for row, other in pairs) if rows.num_rows else 0
    return Count(
        rows=len(inputs),
        lost=len(inputs - set(counts)),
        doubled=sum(n - 1 for n in counts.values()),
        strange=len(set(counts) - inputs),
        differing=differing,
        damaged=tuple(damaged),
        left_behind=sum(_is_temporary(file) for file in table.rglob(".*")),
    )


def _is_temporary(file: Path) -> bool:
    return file.is_file() and file.name != ".lock"


def _sorted_rows(rows: pa.Table, column: str) -> list[dict[str, Any]]:
    """Rows sorted by a column, without the number of the run that wrote them."""
    columns = [name for name in rows.column_names if name != "run"]
    return rows.select(columns).sort_by(column).to_pylist()


def committed(table: Path) -> tuple[pa.Table, list[str]]:
    """The rows of all committed parts, and contradictions between commits and parts."""
    about = json.loads((table / "_table.json").read_text())
    folder = table / about.get("parts", "")
    parts, damaged = [], []
    commits = {}
    for file in sorted((table / "_commits").glob("*.json")):
        commit = json.loads(file.read_text())
        commits[commit["chunk"]] = commit
    if missing := set(range(about["chunks"])) - set(commits):
        damaged.append(f"{len(missing)} chunks are not committed")
    for chunk, commit in sorted(commits.items()):
        part = pq.read_table(folder / f"part-{chunk:06d}.parquet")
        if dict(Counter(part["status"].to_pylist())) != commit["statuses"]:
            damaged.append(f"part {chunk} has other statuses than its commit")
        parts.append(part)
    if len(list(folder.glob("*.parquet"))) != len(parts):
        damaged.append("there are parts without a commit")
    return pa.concat_tables(parts), damaged


def find_damage(table: Path) -> str | None:
    """A problem that a reader of all visible parts would see at this moment, or None."""
    keys: Counter[int] = Counter()
    for part in sorted([*table.glob("*.parquet"), *table.glob("data/*.parquet")]):
        try:
            keys.update(pq.read_table(part)["key"].to_pylist())
        except (pa.ArrowException, OSError) as error:
            return f"{part.name} cannot be read: {error}"
    doubled = sum(n > 1 for n in keys.values())
    return f"{doubled} keys are duplicates" if doubled else None
