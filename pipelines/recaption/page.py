"""The HTML report of a caption table: health, lengths, samples with images, and a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.report.histogram import Histogram, quantile
from pipelines.report.html import page

SUBTITLE = "Captions of the images of a table, one row per image."


@dataclass(frozen=True)
class HealthLine:
    """The captions with one fault, and the limit of its gate."""

    name: str
    meaning: str
    rows: int
    limit: float | None = None  # share; None: no gate

    def fails(self, captions: int) -> bool:
        """Whether the gate does not pass."""
        return self.limit is not None and self.rows > self.limit * captions


@dataclass(frozen=True)
class CaptionSample:
    """One row of the table."""

    key: int
    name: str
    caption: str
    faults: Sequence[str] = ()  # names of health lines
    words: int = 0
    image: bytes | None = None  # only in galleries


@dataclass(frozen=True)
class CaptionReport:
    """The content of the page."""

    title: str
    model: str  # fingerprint
    settings: Sequence[tuple[str, str]]
    counts: Mapping[str, int]  # rows by status
    captions: int
    health: Sequence[HealthLine]
    words: Mapping[int, int]  # captions by number of words
    tokens: Mapping[int, int]
    commonest: Sequence[tuple[int, str]] = ()
    gallery: Sequence[CaptionSample] = field(default_factory=list)  # random rows
    unhealthy: Sequence[CaptionSample] = field(default_factory=list)
    searched: Sequence[CaptionSample] = field(default_factory=list)  # without images


def render(report: CaptionReport) -> str:
    """Render the page as HTML."""
    limit = dict(report.settings).get("generate.max_new_tokens")
    cut = f", which are cut at {limit}" if limit else ""
    charts = [
        Histogram("Words", "Of the captions in the table.", "words", report.words),
        Histogram("Tokens", f"Of the decoded captions{cut}.", "tokens", report.tokens),
    ]
    return page(
        "recaption/page.html.jinja",
        report.title,
        SUBTITLE,
        script="recaption/search.js" if report.captions and report.searched else None,
        report=report,
        charts=charts,
        median=quantile(report.words, 0.5) if report.words else None,
    )
