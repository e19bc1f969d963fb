"""The report page of an image table: rows by status, runs, samples of each status, dead links, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from pipelines.images.rows import OK
from pipelines.report.html import page

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
    read: int | None = None  # rows of the list; None in runs of earlier versions
    again: int = 0  # of `fetched`: rows that the table had

    @property
    def new(self) -> int:
        """Rows of the list that the table did not have."""
        return self.fetched - self.again

    @property
    def known(self) -> int | None:
        """Rows of the list that the table had; with `new` and `dropped` they are `read`."""
        return known_rows(self.read, self.dropped, self.new)


def known_rows(read: int | None, dropped: Mapping[str, int], new: int) -> int | None:
    """Of `read` rows of a list those that the table had; None if it is not known how many were read."""
    return None if read is None else read - sum(dropped.values()) - new


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
    refusals: Sequence[tuple[str, str, int]] = field(default_factory=list)
    """Host, rule, refused rows; in order of rows."""

    def samples_by_status(self) -> list[tuple[str, list[Sample]]]:
        """`ok` first."""
        ordered = sorted(self.samples, key=lambda sample: (sample.status != OK, sample.status))
        groups = groupby(ordered, key=lambda sample: sample.status)
        return [(status, list(samples)) for status, samples in groups]


def render(report: IngestReport) -> str:
    """The page as HTML."""
    return page("ingest/page.html.jinja", report.title, SUBTITLE, report=report)
