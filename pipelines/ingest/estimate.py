"""Estimates before a run: dropped rows by rule, disk and time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import duckdb

from pipelines.estimate.words import size_words, time_words
from pipelines.images.runs import runs_of
from pipelines.ingest.plan import Places, Plan
from pipelines.ingest.run_statistics import last_throughput
from pipelines.pictures.encode import ImageConfig
from pipelines.storage.files import as_path, is_url
from pipelines.storage.tables import PLAN, Table

# Assumptions for a table without measurements.
_BYTES_PER_PIXEL = {"jpeg": 0.4, "webp": 0.3, "png": 1.7}  # of photographs; quality 95
_BYTES_AT_ORIGINAL_SIZE = 300_000
_MAX_PIXELS = 1_500_000  # of a usual web image, however large it may be stored
_BYTES_PER_ROW = 1_000  # the URL, the text, and the minimum of an encoding
_ALIVE = 0.65  # fraction of URLs that still give an image
_ROWS_PER_CPU_SECOND = 50.0
_MAX_PARTS_MEASURED = 200

_BYTES_PER_FILE = 64e6  # of a part in which every row has an image
_MIN_FILES, _MIN_ROWS = 32, 32  # so that a short list keeps all workers busy


def plan_table(plan: Plan) -> str:
    """What becomes of the rows of the list, and which rows of the table change.

    A row of the list counts for the first rule that drops it; the rows that a rule drops by itself stand
    beside. So `rows read` is the sum of the rules and of what is left.
    """
    lines = [("rows read", plan.read, ""), *_dropped(plan), ("left", plan.listed, "")]
    width = max(len(name) for name in ("to be fetched", *(name for name, *_ in lines)))
    again = f"  ({plan.again:,} of them again, of the table)" if plan.again else ""
    of_list = [
        f"{name:<{width}}  {rows:>13,}  {rows / max(plan.read, 1):6.1%}{note}"
        for name, rows, note in lines
    ]
    # The table may have rows that the list has not: no shares of the list.
    return "\n".join(
        [
            *of_list,
            f"{'to be read' if plan.places else 'to be fetched':<{width}}  {plan.fetched:>13,}{again}",
            f"{'to be marked':<{width}}  {plan.marked:>13,}  (rows of the table)",
        ]
    )


def _dropped(plan: Plan) -> list[tuple[str, int, str]]:
    lines = []
    for rule, rows in plan.dropped.items():
        alone = plan.failing.get(rule, rows)
        lines.append((f"- {rule}", rows, f"  ({alone:,} by itself)" if alone != rows else ""))
    return lines


def rows_per_file(rows: int, image: ImageConfig, rows_per_chunk: int | None = None) -> int:
    """Rows of a part for a list of `rows` rows; `rows_per_chunk` overrides the estimate."""
    if rows_per_chunk is not None:
        return rows_per_chunk
    by_size = int(_BYTES_PER_FILE / stored_size(image))
    return max(1, min(by_size, max(_MIN_ROWS, rows // _MIN_FILES)))


def stored_size(image: ImageConfig) -> float:
    """Estimated bytes of a stored photograph."""
    if image.resize == "no":
        return _BYTES_AT_ORIGINAL_SIZE
    pixels = image.size**2 if image.enlarge else min(image.size**2, _MAX_PIXELS)
    return _BYTES_PER_PIXEL[image.format] * pixels + _BYTES_PER_ROW


def count_sites(folder: Path) -> int:
    """The sites (scheme, host and port) of the rows that the plan in a local folder fetches."""
    if not any(Path(folder).glob(f"*{PLAN}")):
        return 0  # every row was dropped
    site = "regexp_extract(url, '^[A-Za-z]+://[^/?#]*')"
    with duckdb.connect() as database:
        found = database.execute(
            f"SELECT count(DISTINCT {site}) FROM read_parquet(?) WHERE mark IS NULL",
            [f"{folder}/*{PLAN}"],
        ).fetchone()
    return int(found[0]) if found else 0


def site_requests(plan: Plan) -> str:
    """One line with the requests for the sites' rules, from a dry run's plan; empty if there are none."""
    if not plan.sites:
        return ""
    requests = len(plan.site_files) * plan.sites
    return (
        f"about {requests:,} more requests for the rules of {plan.sites:,} sites "
        f"({requests / plan.fetched:.2f} for each row), as download.respect_optout has "
        f"{' and '.join(plan.site_files)}; sites that images redirect to add theirs"
    )


def count_places(folder: Path) -> Places:
    """The images that the plan in a local folder reads, where they lie."""
    plans = [str(file) for file in Path(folder).glob(f"*{PLAN}")]
    if not plans:
        return Places(0, 0, 0, 0, [], False)
    with duckdb.connect() as database:

        def ask(columns: str, rest: str = "") -> list[tuple[Any, ...]]:
            query = f"SELECT {columns} FROM read_parquet(?) WHERE mark IS NULL AND {rest}"
            return database.execute(query, [plans]).fetchall()

        ((images, files, known, units),) = ask(
            "count(*), count(DISTINCT path), coalesce(sum(size) FILTER (size > 0), 0), count(unit)",
            "lost IS NULL",
        )
        ((lost,),) = ask("count(*)", "lost IS NOT NULL")
        names = [
            name for (name,) in ask("url", 'lost IS NULL ORDER BY path, "offset", "row" LIMIT 3')
        ]
        unknown = ask("DISTINCT path", "lost IS NULL AND size IS NULL")
    size = int(known) + sum(_file_bytes(path) for (path,) in unknown)
    return Places(images, lost, files, size, names, units > 0)


def _file_bytes(path: str) -> int:
    try:
        return as_path(path).stat().st_size
    except OSError:
        return 0  # it becomes a row with a status


def places_line(places: Places) -> str:
    """One line with what a dry run found in place of URLs."""
    lost = f"; {places.lost:,} rows without an image keep their status" if places.lost else ""
    copy = "; they are first copied into data.output, and the copies deleted at the end"
    names = f" ({', '.join(places.names)}, …)" if places.names else ""
    return (
        f"{places.images:,} images in {places.files:,} files, {size_words(places.bytes)}{names}, are read "
        f"without the network{copy if places.unpacked else ''}{lost}"
    )


def estimate(
    fetched: int, table: Table, image: ImageConfig, cpus: float, alive: float = _ALIVE
) -> str:
    """One line with the disk space and time for `fetched` rows, measured in earlier runs or assumed.

    `alive` is the fraction of rows that is assumed to have an image. A second line warns if the disk has too little space.
    """
    stored, measured_alive = _measured_size(table)
    size = stored or stored_size(image)
    measured = _measured_rate(table)
    rate = measured or _ROWS_PER_CPU_SECOND * cpus
    disk = fetched * (measured_alive or alive) * size
    line = (
        f"about {size_words(disk)} and {time_words(fetched / rate)} for {fetched:,} rows "
        f"({size_words(size)} an image, {'measured here' if stored else 'assumed'}; {rate:,.0f} rows/s, "
        f"{'measured here' if measured else 'assumed'})"
    )
    if not is_url(table.folder):
        free = shutil.disk_usage(_existing_parent(table.folder)).free
        if disk > free:
            line += f"\nwarning: only {size_words(free)} are free at {table.folder}"
    return line


def _measured_size(table: Table) -> tuple[float | None, float | None]:
    """Mean bytes of an `ok` row, and the fraction of such rows, from the parts of the table."""
    commits = table.commits() if table.exists else []
    ok, rows = sum(c.statuses.get("ok", 0) for c in commits), sum(c.rows for c in commits)
    if not ok:
        return None, None
    sample = [commit for commit in commits if commit.statuses.get("ok")][:_MAX_PARTS_MEASURED]
    size = sum(table.part(commit.chunk).stat().st_size for commit in sample)
    return size / sum(commit.statuses["ok"] for commit in sample), ok / rows


def _measured_rate(table: Table) -> float | None:
    """Rows per second of the last run that took more than a minute."""
    for run in reversed(runs_of(table) if table.exists else []):
        done = last_throughput(run)
        if done["seconds"] > 60:
            return float(done["rows"] / done["seconds"])
    return None


def _existing_parent(folder: Path) -> Path:
    while not os.path.isdir(folder):
        folder = folder.parent
    return folder
