"""The report page of an image table: rows by status, runs, samples of each status, dead links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from pipelines.images.rows import OK
from pipelines.report.gallery import embedded
from pipelines.report.html import (
    KINDS,
    MISSING,
    Card,
    Html,
    cards,
    count,
    duration,
    join,
    page,
    percent,
    section,
    status_table,
    table,
    tag,
)

SUBTITLE = "The result of an ingest: every URL that was fetched is a row."


@dataclass(frozen=True)
class RunLine:
    """One run of the table."""

    number: int
    began: str
    seconds: float  # of work
    done: int  # rows logged in that time; fewer than `fetched` if the run was killed
    fetched: int
    marked: int
    dropped: Mapping[str, int]  # rows of the list that were not fetched, by rule


@dataclass(frozen=True)
class Sample:
    """One row of the table."""

    key: int
    url: str
    text: str
    status: str
    image: bytes | None
    why: str  # size and score, or the error


@dataclass(frozen=True)
class IngestReport:
    """The data of the page."""

    title: str
    counts: Mapping[str, int]
    runs: Sequence[RunLine]
    samples: Sequence[Sample] = field(default_factory=list)  # in any order
    hosts: Sequence[tuple[str, int, int, str]] = field(default_factory=list)
    """Host, failed rows, all rows, most common failure; in order of failed rows."""


def render(report: IngestReport) -> str:
    """The page as HTML."""
    content = [cards(_cards(report)), _rows(report), _runs(report)]
    content += [_samples(report), _hosts(report)]
    return page(report.title, SUBTITLE, content)


def _cards(report: IngestReport) -> list[Card]:
    total, good = sum(report.counts.values()), report.counts.get(OK, 0)
    last = report.runs[-1]
    rate = f"{last.done / last.seconds:,.0f}\u00a0/\u00a0s" if last.seconds > 0 else MISSING
    return [
        Card("Images", count(good), f"{percent(good, total)} of {count(total)} rows", "rows"),
        Card(f"Run {last.number}", count(last.fetched), "rows fetched", "runs"),
        Card("Speed", rate, f"rows, over {duration(last.seconds)} of work", "runs"),
    ]


def _rows(report: IngestReport) -> Html:
    lead = "Only rows with status ok are used for training. A failed row keeps its error."
    return section("rows", "Rows", lead, status_table(report.counts, "Rows by status"))


def _runs(report: IngestReport) -> Html:
    lines = [
        (
            f"{run.number}",
            run.began,
            duration(run.seconds),
            count(run.fetched),
            count(run.marked),
            ", ".join(f"{rule} {count(n)}" for rule, n in run.dropped.items()) or MISSING,
        )
        for run in report.runs
    ]
    headings = ["run", "began", "worked", "fetched", "marked", "not fetched"]
    lead = (
        "A run fetches new rows and retries, and marks rows that its filters now drop. It does not "
        "fetch rows that filters drop by their metadata."
    )
    return section("runs", "Runs", lead, table(headings, lines))


def _samples(report: IngestReport) -> Html:
    lead = "Rows from parts spread evenly over the table, by status."
    groups = []
    ordered = sorted(report.samples, key=lambda sample: (sample.status != OK, sample.status))
    for state, samples in groupby(ordered, key=lambda sample: sample.status):
        of_state = list(samples)
        kind = KINDS.get(state.partition(":")[0], "")
        groups.append(tag("h3", "kept" if state == OK else state, tag("small", f" {kind}")))
        if with_image := [sample for sample in of_state if sample.image]:
            groups.append(tag("ul", *map(_tile, with_image), class_="gallery"))
        if without_image := [sample for sample in of_state if not sample.image]:
            rows = [(sample.url, sample.why) for sample in without_image]
            groups.append(table(["address", "why"], rows))
    return section("samples", "What was kept, and what was not", lead, join(groups))


def _tile(sample: Sample) -> Html:
    picture = embedded(sample.image or b"", f"The image of {sample.url}")
    return tag(
        "li",
        tag("div", tag("figure", picture), class_="pictures"),
        tag("dl", tag("dt", "text of the list"), tag("dd", sample.text or "none", dir="auto")),
        tag("p", tag("span", sample.why), class_="key"),
    )


def _hosts(report: IngestReport) -> Html:
    lead = "Hosts with most rows that could not be fetched; link_rot.csv of the run has more."
    if not report.hosts:
        return section("hosts", "Dead links", lead, tag("p", "No fetch failed.", class_="empty"))
    lines = [
        (host, count(failed), count(rows), percent(failed, rows), tag("code", commonest))
        for host, failed, rows, commonest in report.hosts
    ]
    headings = ["host", "failed", "rows", "share", "mostly"]
    return section("hosts", "Dead links", lead, table(headings, lines))
