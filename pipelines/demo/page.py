"""The HTML report of a demo: counts, losses, images and times of all phases."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.demo import proof_page
from pipelines.report.charts import heldout_ends, loss_chart
from pipelines.report.gallery import GalleryItem
from pipelines.report.html import page
from pipelines.storage.files import write_atomically
from pipelines.training.page import STAGES

SUBTITLE = (
    "A run of the Vision-Language-Vision pipeline: web addresses become an image table, the images "
    "train an encoder, the encoder teaches a captioner, and the captioner writes a new dataset."
)


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
    proof: proof_page.Proof | None = None  # scores on test scenes; None for photographs


def write_report(file: Path, report: DemoReport) -> None:
    """Write the page atomically."""
    write_atomically(file, render(report))


def render(report: DemoReport) -> str:
    """Render the page as HTML."""
    trainings = []
    for name, events in report.stages.items():
        title, what = STAGES.get(name, (name, ""))
        trainings.append((loss_chart(title, events, what), heldout_ends(events)))
    return page(
        "demo/page.html.jinja",
        report.title,
        SUBTITLE,
        report=report,
        trainings=trainings,
        proof=report.proof,
        captions_table=proof_page.captions_table,
        denoising_bars=proof_page.denoising_bars,
        reconstruction_table=proof_page.reconstruction_table,
        saw_pictures_only=proof_page.saw_pictures_only,
    )
