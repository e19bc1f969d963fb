"""The HTML report of a caption table: health, lengths, samples with images, and a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from textwrap import shorten

from pipelines.report.gallery import embedded
from pipelines.report.histogram import histogram, quantile
from pipelines.report.html import (
    MISSING,
    Card,
    Html,
    cards,
    count,
    join,
    page,
    percent,
    section,
    status_table,
    table,
    tag,
)

SUBTITLE = "Captions of the images of a table, one row per image."


_MAX_REPEATED, _MAX_CHARACTERS = 10, 240  # of the table of repeated captions


@dataclass(frozen=True)
class HealthLine:
    """The captions with one fault, and the limit of its gate."""

    name: str
    meaning: str
    rows: int
    limit: float | None = None  # share; None: no gate


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
    content = [cards(_cards(report)), _rows(report)]
    if report.captions:
        content += [_health(report), _lengths(report), _repeated(report)]
        content += [_gallery(report), _unhealthy(report), _search(report)]
    content.append(_settings(report))
    script = resources.files(__package__).joinpath("search.js").read_text("utf-8")
    return page(report.title, SUBTITLE, content, script if report.searched else None)


def _cards(report: CaptionReport) -> list[Card]:
    total = sum(report.counts.values())
    failing = [line.name for line in report.health if _fails(line, report.captions)]
    gated = [line for line in report.health if line.limit is not None]
    median = f"{quantile(report.words, 0.5):,}" if report.words else MISSING
    captions = Card("Captions", count(report.captions), f"{percent(report.captions, total)} of {count(total)} rows", "rows")  # fmt: skip
    figures = [captions, Card("Length", median, "words, the median", "lengths")]
    if report.captions:
        worst = max(report.health, key=lambda line: line.rows)
        share = percent(worst.rows, report.captions)
        figures.append(Card("Commonest fault", share, f"of the captions: {worst.name}", "health"))
    if failing:
        figures.append(Card("Gates", "not passed", ", ".join(failing), "health"))
    elif gated:
        figures.append(Card("Gates", "passed", ", ".join(line.name for line in gated), "health"))
    else:
        figures.append(Card("Gates", "none", "gate.* sets limits", "health"))
    return figures


def _fails(line: HealthLine, captions: int) -> bool:
    return line.limit is not None and line.rows > line.limit * captions


def _rows(report: CaptionReport) -> Html:
    lead = "An image that failed keeps its row, with the reason."
    return section("rows", "Rows", lead, status_table(report.counts, "Rows by status"))


def _health(report: CaptionReport) -> Html:
    lines = []
    for line in report.health:
        gate: object = MISSING
        if line.limit is not None:
            fails = _fails(line, report.captions)
            verdict = tag("span", "not passed" if fails else "passed",
                          class_="badge" if fails else "badge ok")  # fmt: skip
            gate = join([f"at most {100 * line.limit:.3g}\u00a0% ", verdict])
        name = join([line.name, tag("small", f" {line.meaning}")])
        lines.append((name, count(line.rows), percent(line.rows, report.captions), gate))
    lead = "Faults that the text of a caption shows; a caption can have several."
    headings = ["fault", "captions", "share", "gate"]
    return section("health", "Health", lead, table(headings, lines))


def _lengths(report: CaptionReport) -> Html:
    limit = dict(report.settings).get("generate.max_new_tokens")
    cut = f", which are cut at {limit}" if limit else ""
    shown = (
        histogram("Words", report.words, "words", "Of the captions in the table."),
        histogram("Tokens", report.tokens, "tokens", f"Of the decoded captions{cut}."),
    )
    lead = "A peak at the right end means a model that does not stop; a peak at 0, empty captions."
    return section("lengths", "Lengths", lead, tag("div", *shown, class_="charts"))


def _repeated(report: CaptionReport) -> Html:
    lead = "Captions that several images share, exactly or nearly; the first of each group."
    if not report.commonest:
        shown = tag("p", "No two images have the same caption.", class_="empty")
        return section("same", "Repeated captions", lead, shown)
    lines = [
        (count(size), tag("span", shorten(text, _MAX_CHARACTERS, placeholder=" …"), dir="auto"))
        for size, text in report.commonest[:_MAX_REPEATED]
    ]
    return section("same", "Repeated captions", lead, table(["images", "caption"], lines))


def _gallery(report: CaptionReport) -> Html:
    lead = "Random rows of status ok from some parts of the table."
    shown = tag("ul", *map(_tile, report.gallery), class_="gallery")
    return section("gallery", "A random gallery", lead, shown)


def _unhealthy(report: CaptionReport) -> Html:
    if not report.unhealthy:
        return Html()
    parts = []
    for line in report.health:
        samples = [sample for sample in report.unhealthy if line.name in sample.faults[:1]]
        if samples:
            parts.append(tag("h3", line.name))
            parts.append(tag("ul", *map(_tile, samples), class_="gallery"))
    lead = "Rows with a fault, among the rows sampled for this page."
    return section("unhealthy", "Faulty captions", lead, join(parts))


def _tile(sample: CaptionSample) -> Html:
    if sample.image:
        picture = embedded(sample.image, f"The image {sample.name}")
    else:
        picture = tag("span", "not readable", class_="none")
    text = sample.caption.strip()
    words = tag("dd", text, dir="auto") if text else tag("dd", "empty", class_="none")
    faults = [tag("span", fault, class_="badge") for fault in sample.faults]
    return tag(
        "li",
        tag("div", tag("figure", picture), class_="pictures"),
        tag("dl", words),
        tag("p", tag("span", sample.name, class_="name"), *faults, class_="key"),
    )


def _search(report: CaptionReport) -> Html:
    lead = (
        f"{count(len(report.searched))} random captions; shows those with all typed words in caption, "
        "name, key or fault."
    )
    box = tag(
        "label",
        "Words ",
        tag("input", id="search-words", type="search", autocomplete="off"),
        tag("output", id="search-count", for_="search-words"),
        class_="search",
        hidden="",  # the script shows it
    )
    lines = [
        (
            tag("span", sample.caption, dir="auto"),
            sample.name,
            str(sample.key),
            ", ".join(sample.faults),
        )
        for sample in report.searched
    ]
    results = tag("div", table(["caption", "image", "key", "faults"], lines), class_="found")
    return section("search", "Search", lead, box, results)


def _settings(report: CaptionReport) -> Html:
    lead = "Every row has the model's fingerprint, which covers everything that affects a caption."
    lines = [("model", tag("code", report.model)), *report.settings]
    return section("made", "Model and settings", lead, table(["setting", "value"], lines))
