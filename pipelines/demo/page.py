"""The HTML report of a demo: counts, losses, images and times of all phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.demo.proof_page import Proof, proof_cards, proof_section
from pipelines.images.rows import OK
from pipelines.report.charts import before_after, change, heldout_ends, loss_chart
from pipelines.report.gallery import GalleryItem, gallery
from pipelines.report.html import (
    MISSING,
    Card,
    Html,
    cards,
    count,
    duration,
    notes,
    page,
    percent,
    section,
    status_table,
    table,
    tag,
    time_table,
)
from pipelines.storage.files import write_atomically

SUBTITLE = (
    "A run of the Vision-Language-Vision pipeline: web addresses become an image table, the images "
    "train an encoder, the encoder teaches a captioner, and the captioner writes a new dataset."
)

STAGES = {
    "stage1": (
        "Stage 1: images only",
        "The encoder learns embeddings of an image that let the frozen diffusion decoder remove "
        "its noise. No captions are used. Loss: mean squared error of the noise.",
    ),
    "stage2": (
        "Stage 2: images and captions",
        "The captioner learns to decode the encoder's embeddings into words. "
        "Loss: cross-entropy per token.",
    ),
}
"""Titles and explanations of training runs by name; other runs are titled by their name."""


@dataclass(frozen=True)
class DemoReport:
    """The content of the page; empty values for phases without results."""

    title: str
    notes: list[str] = field(default_factory=list)
    ingest: dict[str, int] = field(default_factory=dict)  # rows by status, as `Table.counts`
    stages: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # `read_metrics` by name
    recaption: dict[str, int] = field(default_factory=dict)
    reconstruct: dict[str, int] = field(default_factory=dict)
    gallery: list[GalleryItem] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, in their order
    versions: dict[str, str] = field(default_factory=dict)
    proof: Proof | None = None  # scores on test scenes; None for photographs


def write_report(file: Path, report: DemoReport) -> None:
    """Write the page atomically."""
    write_atomically(file, render(report))


def render(report: DemoReport) -> str:
    """Render the page as HTML."""
    content = [
        notes(report.notes),
        cards(proof_cards(report.proof), "Does it work?") if report.proof else Html(),
        cards(_cards(report)),
        proof_section(report.proof) if report.proof else Html(),
        _ingest(report),
        _training(report),
        _gallery(report),
        _tables(report),
        _run(report),
    ]
    return page(report.title, SUBTITLE, content)


# ------------------------------------------------------------------------------------- sections


def _cards(report: DemoReport) -> list[Card]:
    stages = [_stage_card(name, events) for name, events in report.stages.items()]
    longest = max(report.seconds, key=lambda phase: report.seconds[phase], default="")
    whole = duration(sum(report.seconds.values())) if report.seconds else MISSING
    note = f"longest: {longest}, {duration(report.seconds[longest])}" if longest else "not timed"
    return [
        _rows_card("Ingest", report.ingest, "images", "ingest"),
        *stages,
        _rows_card("Recaption", report.recaption, "captions", "tables"),
        _rows_card("Reconstruct", report.reconstruct, "pictures", "tables"),
        Card("Time", whole, note, "run"),
    ]


def _rows_card(label: str, counts: Mapping[str, int], what: str, target: str) -> Card:
    total, good = sum(counts.values()), counts.get(OK, 0)
    note = f"{what} ok, {percent(good, total)} of {count(total)} rows" if total else "no rows"
    return Card(label, count(good) if total else MISSING, note, target)


def _stage_card(name: str, events: list[dict[str, Any]]) -> Card:
    label = STAGES[name][0].partition(":")[0] if name in STAGES else name
    ends = heldout_ends(events)
    if ends is None:
        return Card(label, MISSING, "not evaluated before and after", "training")
    return Card(label, change(*ends), f"held-out loss {before_after(*ends)}", "training")


def _ingest(report: DemoReport) -> Html:
    lead = (
        "Every fetched URL is a row. A URL that failed keeps its row, with the reason; only rows of "
        "status ok are trained on."
    )
    return section("ingest", "Ingest", lead, status_table(report.ingest, "Rows by status"))


def _training(report: DemoReport) -> Html:
    lead = (
        "Lower is better. The held-out loss is measured on rows that are never trained on, "
        "with the same noise each time, so its points can be compared."
    )
    charts = []
    for name, events in report.stages.items():
        title, what = STAGES.get(name, (name, ""))
        charts.append(loss_chart(title, events, what))
    if not charts:
        charts.append(tag("p", "Nothing was trained.", class_="empty"))
    return section("training", "Training", lead, tag("div", *charts, class_="charts"))


def _gallery(report: DemoReport) -> Html:
    lead = "Held-out images. The reconstruction is generated from the caption embeddings alone"
    if any(item.from_caption for item in report.gallery):
        lead += "; the image next to it, from the true caption by the same decoder, is the ceiling"
    lead += ". Marked words differ from the teacher’s caption."
    return section("gallery", "What the model sees", lead, gallery(report.gallery))


def _tables(report: DemoReport) -> Html:
    lead = "The tables of recaption and reconstruct, one row per held-out image."
    tables = [
        status_table(report.recaption, "Recaption"),
        status_table(report.reconstruct, "Reconstruct"),
    ]
    return section("tables", "Tables written", lead, tag("div", *tables, class_="columns"))


def _run(report: DemoReport) -> Html:
    versions = table(["package", "version"], list(report.versions.items()), "Versions")
    parts = [time_table(report.seconds, "Time by phase"), versions if report.versions else Html()]
    lead = "Time per phase and package versions."
    return section("run", "This run", lead, tag("div", *parts, class_="columns"))
