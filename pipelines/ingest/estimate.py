"""What a run will do, said before it is done: rows by rule, disk and time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipelines.images.runs import runs_of
from pipelines.ingest.account import last_throughput
from pipelines.ingest.plan import Plan
from pipelines.pictures.encode import ImageConfig
from pipelines.storage.protocols import is_url
from pipelines.storage.tables import Table

# Where a table has nothing to measure yet: bytes per stored pixel of photographs by encoding (JPEG
# and WebP at quality 95), bytes of an image that is stored at its own size, the share of URLs that
# still lead to an image, and images per second of one CPU.
_BYTES_PER_PIXEL = {"jpeg": 0.4, "webp": 0.3, "png": 1.7}
_BYTES_AT_OWN_SIZE = 300_000
_MOST_PIXELS = 1_500_000  # of a usual picture of the web, however large it might be stored
_BYTES_OF_A_ROW = 1_000  # the URL, the text, and what an encoding needs at least
_ALIVE = 0.65
_PER_CPU = 50.0
_SAMPLED = 200  # parts whose size is asked for

_FILE_BYTES = 64e6  # of a part whose images are all there
_FEWEST_FILES, _FEWEST_ROWS = 32, 32  # a short list still keeps every worker busy


def plan_table(plan: Plan) -> str:
    """How many rows each rule drops: in the order of the rules, and each by itself."""
    lines = [("rows read", plan.read, ""), *_dropped(plan), ("left", plan.listed, "")]
    lines += [("to be fetched", plan.fetched, ""), ("to be marked anew", plan.marked, "")]
    width = max(len(name) for name, *_ in lines)
    return "\n".join(
        f"{name:<{width}}  {rows:>13,}  {rows / max(plan.read, 1):6.1%}{note}"
        for name, rows, note in lines
    )


def _dropped(plan: Plan) -> list[tuple[str, int, str]]:
    told = []
    for rule, rows in plan.dropped.items():
        alone = plan.failing.get(rule, rows)
        told.append((f"- {rule}", rows, f"  ({alone:,} by itself)" if alone != rows else ""))
    return told


def rows_per_file(rows: int, image: ImageConfig) -> int:
    """Rows of a part, of a list of `rows`."""
    by_size = int(_FILE_BYTES / stored_size(image))
    return max(1, min(by_size, max(_FEWEST_ROWS, rows // _FEWEST_FILES)))


def stored_size(image: ImageConfig) -> float:
    """Bytes of a stored photograph, by a rule of thumb."""
    if image.resize == "no":
        return _BYTES_AT_OWN_SIZE
    pixels = image.size**2 if image.enlarge else min(image.size**2, _MOST_PIXELS)
    return _BYTES_PER_PIXEL[image.format] * pixels + _BYTES_OF_A_ROW


def estimate(fetched: int, table: Table, image: ImageConfig, cpus: float) -> str:
    """Disk and time of fetching, by what the table's earlier runs took, or by rules of thumb."""
    stored, alive = _measured_size(table)
    size = stored or stored_size(image)
    measured = _measured_rate(table)
    rate = measured or _PER_CPU * cpus
    disk = fetched * (alive or _ALIVE) * size
    line = (
        f"about {_bytes(disk)} and {_time(fetched / rate)} for {fetched:,} rows "
        f"({_bytes(size)} an image, {'measured here' if stored else 'assumed'}; {rate:,.0f} rows/s, "
        f"{'measured here' if measured else 'assumed'})"
    )
    if not is_url(table.folder):
        free = shutil.disk_usage(_existing(table.folder)).free
        if disk > free:
            line += f"\nwarning: only {_bytes(free)} are free at {table.folder}"
    return line


def _measured_size(table: Table) -> tuple[float | None, float | None]:
    """Bytes of an `ok` row and share of such rows, over the parts of the table."""
    commits = table.commits() if table.exists else []
    ok, rows = sum(c.statuses.get("ok", 0) for c in commits), sum(c.rows for c in commits)
    if not ok:
        return None, None
    some = [commit for commit in commits if commit.statuses.get("ok")][:_SAMPLED]
    size = sum(table.part(commit.chunk).stat().st_size for commit in some)
    return size / sum(commit.statuses["ok"] for commit in some), ok / rows


def _measured_rate(table: Table) -> float | None:
    """Rows per second of the last run that took a minute at least."""
    for run in reversed(runs_of(table) if table.exists else []):
        done = last_throughput(run)
        if done["seconds"] > 60:
            return float(done["rows"] / done["seconds"])
    return None


def _existing(folder: Path) -> Path:
    while not os.path.isdir(folder):
        folder = folder.parent
    return folder


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
