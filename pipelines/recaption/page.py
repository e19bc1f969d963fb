"""The report of a caption table: its health, lengths, samples with their pictures, and a search."""

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

SUBTITLE = "What a captioner said of the images of a table: every image is a row."


_COMMONEST, _LONGEST = 10, 240  # captions that several images share, and characters of one


@dataclass(frozen=True)
class HealthLine:
    """Captions with one fault, and how many of them the gate lets through."""

    name: str
    meaning: str
    rows: int
    most: float | None = None  # share; None: no gate


@dataclass(frozen=True)
class CaptionSample:
    """One row of the table."""

    key: int
    name: str
    caption: str
    faults: Sequence[str] = ()  # names of health lines
    words: int = 0
    image: bytes | None = None  # of those that are shown with their picture


@dataclass(frozen=True)
class CaptionReport:
    """All that the page shows."""

    title: str
    model: str  # fingerprint
    settings: Sequence[tuple[str, str]]
    counts: Mapping[str, int]  # rows by status
    captions: int
    health: Sequence[HealthLine]
    words: Mapping[int, int]  # captions by number of words
    tokens: Mapping[int, int]
    commonest: Sequence[tuple[int, str]] = ()
    gallery: Sequence[CaptionSample] = field(default_factory=list)  # drawn at random
    unhealthy: Sequence[CaptionSample] = field(default_factory=list)
    searched: Sequence[CaptionSample] = field(default_factory=list)  # without pictures


def render(report: CaptionReport) -> str:
    """The page as text."""
    content = [cards(_cards(report)), _rows(report)]
    if report.captions:
        content += [_health(report), _lengths(report), _same(report)]
        content += [_gallery(report), _unhealthy(report), _search(report)]
    content.append(_made(report))
    script = resources.files(__package__).joinpath("search.js").read_text("utf-8")
    return page(report.title, SUBTITLE, content, script if report.searched else None)


def _cards(report: CaptionReport) -> list[Card]:
    total = sum(report.counts.values())
    failing = [line.name for line in report.health if _fails(line, report.captions)]
    gated = [line for line in report.health if line.most is not None]
    median = f"{quantile(report.words, 0.5):,}" if report.words else MISSING
    found = Card("Captions", count(report.captions), f"{percent(report.captions, total)} of {count(total)} rows", "rows")  # fmt: skip
    figures = [found, Card("Length", median, "words, the median", "lengths")]
    if report.captions:
        worst = max(report.health, key=lambda line: line.rows)
        shown = percent(worst.rows, report.captions)
        figures.append(Card("Commonest fault", shown, f"of the captions: {worst.name}", "health"))
    if failing:
        figures.append(Card("Gates", "not passed", ", ".join(failing), "health"))
    elif gated:
        figures.append(Card("Gates", "passed", ", ".join(line.name for line in gated), "health"))
    else:
        figures.append(Card("Gates", "none", "gate.* sets what is too much", "health"))
    return figures


def _fails(line: HealthLine, captions: int) -> bool:
    return line.most is not None and line.rows > line.most * captions


def _rows(report: CaptionReport) -> Html:
    lead = "A failure keeps its row and says why it has no caption."
    return section("rows", "Rows", lead, status_table(report.counts, "Rows by status"))


def _health(report: CaptionReport) -> Html:
    lines = []
    for line in report.health:
        gate: object = MISSING
        if line.most is not None:
            fails = _fails(line, report.captions)
            verdict = tag("span", "not passed" if fails else "passed",
                          class_="badge" if fails else "badge ok")  # fmt: skip
            gate = join([f"at most {100 * line.most:.3g}\u00a0% ", verdict])
        name = join([line.name, tag("small", f" {line.meaning}")])
        lines.append((name, count(line.rows), percent(line.rows, report.captions), gate))
    lead = "What is wrong with captions, seen from their text alone; one can have several faults."
    headings = ["fault", "captions", "share", "gate"]
    return section("health", "Health", lead, table(headings, lines))


def _lengths(report: CaptionReport) -> Html:
    limit = dict(report.settings).get("generate.max_new_tokens")
    cut = f", which are cut at {limit}" if limit else ""
    shown = (
        histogram("Words", report.words, "words", "Of the caption as it is in the table."),
        histogram("Tokens", report.tokens, "tokens", f"As they were decoded{cut}."),
    )
    lead = "A peak at the right end is a model that does not stop, one at 0 a model that is silent."
    return section("lengths", "Lengths", lead, tag("div", *shown, class_="charts"))


def _same(report: CaptionReport) -> Html:
    lead = "Captions that several images share, or that hardly differ; the first of each."
    if not report.commonest:
        shown = tag("p", "No two images have the same caption.", class_="empty")
        return section("same", "Said of several images", lead, shown)
    lines = [
        (count(size), tag("span", shorten(text, _LONGEST, placeholder=" …"), dir="auto"))
        for size, text in report.commonest[:_COMMONEST]
    ]
    return section("same", "Said of several images", lead, table(["images", "caption"], lines))


def _gallery(report: CaptionReport) -> Html:
    lead = "Rows of status ok, drawn at random from some parts of the table."
    shown = tag("ul", *map(_tile, report.gallery), class_="gallery")
    return section("gallery", "A random gallery", lead, shown)


def _unhealthy(report: CaptionReport) -> Html:
    if not report.unhealthy:
        return Html()
    parts = []
    for line in report.health:
        some = [sample for sample in report.unhealthy if line.name in sample.faults[:1]]
        if some:
            parts.append(tag("h3", line.name))
            parts.append(tag("ul", *map(_tile, some), class_="gallery"))
    lead = "Rows with a fault, found among the rows that were looked through for this page."
    return section("unhealthy", "What is wrong", lead, join(parts))


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
        f"{count(len(report.searched))} captions, drawn as in the gallery; those that have all of the words "
        "typed, in caption, name, key or fault."
    )
    box = tag(
        "label",
        "Words ",
        tag("input", id="search-words", type="search", autocomplete="off"),
        tag("output", id="search-count", for_="search-words"),
        class_="search",
        hidden="",  # until the script is there that it needs
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
    found = tag("div", table(["caption", "image", "key", "faults"], lines), class_="found")
    return section("search", "Search", lead, box, found)


def _made(report: CaptionReport) -> Html:
    lead = "The fingerprint stands in every row; whatever decides a caption is part of it."
    lines = [("model", tag("code", report.model)), *report.settings]
    return section("made", "Model and settings", lead, table(["setting", "value"], lines))
