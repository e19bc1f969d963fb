"""Collects the data of an image table's report and writes the page into the table's folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np

from pipelines.images.rows import DOWNLOAD, OK
from pipelines.images.runs import Run, last_run, runs_of
from pipelines.ingest.page import IngestReport, RunLine, Sample, render
from pipelines.ingest.run_statistics import (
    OTHERS,
    last_throughput,
    read_link_rot,
    read_refusals,
)
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.parquet import open_parquet
from pipelines.storage.tables import Table

REPORT = "_report.html"  # hidden from globs of the table's files
_PARTS_SAMPLED = 12
_OK_SAMPLES, _OTHER_SAMPLES = 12, 6  # for each other status
_HOSTS_SHOWN = 20
_COLUMNS = ["key", "url", "alt_text", "aesthetic", "original_width", "original_height"]
_COLUMNS += ["status", "error"]


def remove_report(table: Table) -> None:
    """Delete the page, if it exists."""
    if is_file(table.folder / REPORT):
        (table.folder / REPORT).unlink()


def write_report(table: Table, hides: Callable[[str], bool] = lambda host: False) -> None:
    """Write the page if the table's last run is finished; otherwise only delete the old one.

    Hosts for which `hides` is true are left out of the dead links.
    """
    remove_report(table)
    last = last_run(table)
    if last is None or not last.is_finished:
        return
    report = IngestReport(
        title=f"Images of {table.folder.name}",
        counts=table.counts(),
        runs=[_line(run) for run in runs_of(table)],
        samples=_samples(table),
        hosts=_hosts(last, hides),
        refusals=_refusals(last, hides),
    )
    write_atomically(table.folder / REPORT, render(report))


def _line(run: Run) -> RunLine:
    about, throughput = run.describe(), last_throughput(run)
    return RunLine(
        number=run.number,
        began=datetime.fromtimestamp(about["started"]).strftime("%Y-%m-%d %H:%M"),
        seconds=throughput["seconds"],
        done=throughput["rows"],
        fetched=about["fetched"],
        marked=about["marked"],
        dropped=about["dropped"],
        read=about.get("read"),
        again=about.get("again", 0),
    )


def _samples(table: Table) -> list[Sample]:
    """Rows of each status, from parts spread evenly over the table."""
    commits = [commit for commit in table.commits() if commit.rows]
    parts = np.linspace(0, len(commits) - 1, min(_PARTS_SAMPLED, len(commits))).astype(int)
    taken: Counter[str] = Counter()
    samples = []
    for number, part in enumerate(parts.tolist(), start=1):
        with open_parquet(table.part(commits[part].chunk)) as parquet:
            rows = parquet.read(columns=_COLUMNS).to_pylist()
            chosen: dict[int, dict[str, Any]] = {}
            for position, row in enumerate(rows):
                state = row["status"]
                # Each part gives at most its share, so that the samples come from many parts.
                wanted = _OK_SAMPLES if state == OK else _OTHER_SAMPLES
                if taken[state] < math.ceil(wanted * number / len(parts)):
                    taken[state] += 1
                    chosen[position] = row
            images = _images(parquet, list(chosen))
        samples += [_sample(row, images[position]) for position, row in chosen.items()]
    return samples


def _images(parquet: Any, positions: list[int]) -> dict[int, bytes | None]:
    """The images of rows of a part, read from their row groups only."""
    images: dict[int, bytes | None] = {}
    start = 0
    for group in range(parquet.num_row_groups):
        end = start + parquet.metadata.row_group(group).num_rows
        inside = [position for position in positions if start <= position < end]
        if inside:
            column = parquet.read_row_group(group, columns=["image"])["image"]
            for position in inside:
                images[position] = (column[position - start].as_py() or {}).get("bytes")
        start = end
    return images


def _sample(row: dict[str, Any], image: bytes | None) -> Sample:
    size = f"{row['original_width']}×{row['original_height']}" if row["original_width"] else ""
    score = "" if row["aesthetic"] is None else f"aesthetic {row['aesthetic']:.1f}"
    why = row["error"] or ", ".join(filter(None, (size, score)))
    text = row["alt_text"] or ""
    return Sample(row["key"], row["url"], text, row["status"], image, why)


def _hosts(run: Run, hides: Callable[[str], bool]) -> list[tuple[str, int, int, str]]:
    rows: Counter[str] = Counter()
    failed: dict[str, Counter[str]] = {}
    for line in read_link_rot(run):
        host = line["host"]
        if host == OTHERS or hides(host):
            continue
        rows[host] += line["rows"]
        if line["status"].startswith(DOWNLOAD):
            failed.setdefault(host, Counter())[line["status"]] += line["rows"]
    worst = sorted(failed, key=lambda host: (-failed[host].total(), host))[:_HOSTS_SHOWN]
    return [
        (host, failed[host].total(), rows[host], failed[host].most_common(1)[0][0])
        for host in worst
    ]


def _refusals(run: Run, hides: Callable[[str], bool]) -> list[tuple[str, str, int]]:
    """Host, rule and rows; those with most rows."""
    lines = [line for line in read_refusals(run) if line["host"] != OTHERS]
    shown = [
        (line["host"], line["rule"], line["rows"]) for line in lines if not hides(line["host"])
    ]
    return sorted(shown, key=lambda line: (-line[2], line))[:_HOSTS_SHOWN]
