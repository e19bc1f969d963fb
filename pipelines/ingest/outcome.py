"""What an ingest prints at its end: what it did, what to retry, and why there is no image."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.execution.progress import counts_table
from pipelines.images.rows import OK
from pipelines.images.runs import Run
from pipelines.ingest.config import RETRY_STATUSES
from pipelines.ingest.page import known_rows
from pipelines.ingest.report import REPORT
from pipelines.storage.tables import Table

CAUSES = {
    "download:blocked_address": "their hosts are on this machine or its network: "
    "download.allow_private=true allows these",
    "download:proxy": "download.proxy does not answer",
    "download:dns": "no name was resolved: is this machine connected, or behind a proxy "
    "(download.proxy)?",
    "download:refused": "no server answered: is this machine connected, or behind a proxy "
    "(download.proxy)?",
    "download:timeout": "no server answered in time: is this machine connected, or behind a proxy "
    "(download.proxy)? download.total_timeout is the limit",
    "download:too_large": "download.max_bytes is the limit",
    "download:opted_out": "their servers opt out; download.respect_optout decides whether that counts",
    "decode:too_large": "image.max_pixels is the limit",
    "decode:timeout": "each took longer than a minute",
    "decode:no_image": "their metadata or rows have no image",
    "decode:shard": "their .tar shards are damaged",
    "decode:unreadable": "their files cannot be read",
    "decode:unsupported": "pip install 'vlv-ray[heif,jxl]' adds formats",
    "filtered:aesthetic": "filter.min_aesthetic is the limit",
    "filtered:pwatermark": "filter.max_pwatermark is the limit",
    "filtered:punsafe": "filter.max_punsafe is the limit",
    "filtered:short_side": "filter.min_short_side is the limit",
    "filtered:aspect_ratio": "filter.min_aspect_ratio and filter.max_aspect_ratio are the limits",
}
"""The setting, or what else, that decides on rows of a status."""


def end_of_run(table: Table, run: Run, counts: Mapping[str, int], had_work: bool) -> str:
    """What a finished run did, the rows of its table by status, and where they are."""
    about = run.describe()
    done = "read" if about.get("local") else "fetched"
    lines = [f"this table is already complete: nothing was {done}"]
    if had_work:
        fetched, marked, again = about["fetched"], about["marked"], about.get("again", 0)
        lines = [
            f"run {run.number}: {fetched:,} rows {done} ({again:,} of them again), {marked:,} with a "
            "new status or new metadata"
        ]
    lines += [counts_table(counts), f"metadata rows read: {about['read']:,}"]
    new = about["fetched"] - about.get("again", 0)
    if known := known_rows(about["read"], about["dropped"], new):
        lines.append(f"of these in the table: {known:,}")
    lines += [f"of these not {done}: {rule} {rows:,}" for rule, rows in about["dropped"].items()]
    lines += [f"image table: {table.folder}", f"report: {table.folder / REPORT}"]
    return "\n".join([*lines, *filter(None, [retry_line(counts, run.number > 1)])])


def retry_line(statuses: Mapping[str, int], is_rerun: bool = False) -> str:
    """Which rows of a table `retry` would try again, in one line; empty if there are none.

    In a table of several runs, the filters may have changed since a row failed.
    """
    counts = {
        name: sum(statuses.get(status, 0) for status in stands_for)
        for name, stands_for in RETRY_STATUSES.items()
    }
    if not (failed := counts.pop("all")):
        return ""
    transient = counts.pop("transient")
    shown = sorted(((n, name) for name, n in counts.items() if n), reverse=True)[:2]
    if transient and transient not in [n for n, _ in shown]:
        shown.insert(0, (transient, "transient"))
    words = [f"retry={name} tries {n:,} of them again" for n, name in shown]
    end = "; those that filter.* drops now are left out" if is_rerun else ""
    return f"{failed:,} rows failed: {', '.join(words)}, retry=all tries all{end}"


def cause_of_nothing(statuses: Mapping[str, int], dropped: Mapping[str, int]) -> str | None:
    """Why a table has no row of status ok, in one line with the setting; None if it has one."""
    if statuses.get(OK):
        return None
    found = statuses or dropped
    if not found:
        return "no row is ok: the list has no rows"
    status, rows = max(found.items(), key=lambda item: item[1])
    line = f"no row is ok: {rows:,} of {sum(found.values()):,} are {status}"
    return f"{line}: {CAUSES.get(status, 'the column error and _report.html say more')}"
