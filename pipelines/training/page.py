"""The report page of a training run: figures, curves, samples, rows, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.report.charts import LineChart, heldout_ends, loss_chart, median_of_last, series
from pipelines.report.figures import MISSING, known, percent
from pipelines.report.gallery import GalleryItem
from pipelines.report.html import page

LAST = 50  # steps, over which the current speed and loss are taken

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
class Start:
    """The start of a run's workers: its first, a continuation, or a restart after a failure."""

    time: str
    step: int  # from which it continues
    workers: int
    device: str
    repeated: int  # steps after the checkpoint that an earlier attempt had done


@dataclass(frozen=True)
class TrainingReport:
    """The content of the page."""

    title: str
    stage: str  # key of STAGES
    state: str  # in words
    steps: int  # planned
    schedule: str  # in words
    max_grad_norm: float  # 0: no clipping
    events: Sequence[dict[str, Any]]  # `read_metrics`
    notes: Sequence[str] = ()
    rows: Mapping[str, int] = field(default_factory=dict)  # of the input, by what became of them
    removed: int = 0  # rows that the run began with and that are gone
    samples: Mapping[int, Sequence[GalleryItem]] = field(default_factory=dict)  # by step
    sampled_images: int = 0  # train.samples
    starts: Sequence[Start] = ()
    identity: Sequence[tuple[str, str]] = ()  # of models and data
    settings: Sequence[tuple[str, str]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SampledImage:
    """An image, and what the model made of it at each of some steps."""

    key: int
    original: bytes
    target: str | None
    by_step: Sequence[tuple[int, GalleryItem]]


def render(report: TrainingReport) -> str:
    """Render the page as HTML."""
    steps = [event for event in report.events if event["event"] == "step"]
    title, what = STAGES.get(report.stage, (report.stage, ""))
    return page(
        "training/page.html.jinja",
        report.title,
        f"{title}. {what}",
        report=report,
        done=steps[-1]["step"] if steps else 0,
        seconds=sum(event["seconds"] for event in steps),
        heldout=heldout_ends(report.events),
        train_loss=median_of_last(series(steps, "step", "loss"), LAST),
        speed=median_of_last(series(steps, "step", "images_per_second"), LAST),
        waiting=waiting_share(steps[-LAST:]),
        memory=max((e["memory_gb"] for e in steps if known(e.get("memory_gb"))), default=None),
        last=min(LAST, len(steps)),
        losses=loss_chart("Loss", report.events, "Of the training batches, and of held-out rows."),
        lines=_lines(report, steps),
        sampled=_by_image(report.samples),
    )


def waiting_share(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of the steps' time in which workers waited for rows; None without steps."""
    seconds = sum(event["seconds"] for event in steps)
    return sum(event["data_seconds"] for event in steps) / seconds if seconds else None


def clipped(steps: Sequence[Mapping[str, Any]], max_grad_norm: float) -> int:
    """The number of steps whose gradient was clipped."""
    norms = [event.get("grad_norm") for event in steps]
    return sum(max_grad_norm > 0 and known(norm) and norm > max_grad_norm for norm in norms)


def _lines(report: TrainingReport, steps: Sequence[dict[str, Any]]) -> list[LineChart]:
    """Charts of the figures that the steps have."""
    clip = "Before clipping."
    norms = "train.max_grad_norm=0: no step was clipped."
    if report.max_grad_norm:
        number = clipped(steps, report.max_grad_norm)
        norms = (
            f"Above train.max_grad_norm={report.max_grad_norm:g}, and so clipped, in "
            f"{number:,} of {len(steps):,} steps ({percent(number, len(steps))})."
        )
    rows = "Share of a step in which the slowest worker waited for its rows, in per cent."
    figures: list[tuple[str, str, str, str, float]] = [
        ("learning_rate", "Learning rate", report.schedule, "Highest {highest}, last {last}.", 1),
        ("grad_norm", "Gradient norm", clip, norms, 1),
        ("images_per_second", "Speed", "Images per second, over all workers.",
         "Median of the last {count} steps: {median}.", 1),
        ("data_share", "Waiting for rows", rows,
         f"{_share(waiting_share(steps))} of the time of all steps.", 100),
        ("memory_gb", "Memory", "Peak of the first worker since its start, in GB.", "Highest {highest}.", 1),
        ("mfu", "Model FLOP utilisation", "Share of the device's measured rate, in per cent.",
         "Median of the last {count} steps: {median}.", 100),
    ]  # fmt: skip
    charts = []
    for name, title, lead, summary, factor in figures:
        points = [(at, v * factor) for at, v in series(steps, "step", name) if known(v)]
        if points:
            words = summary.format(
                highest=_number(max(value for _, value in points)),
                last=_number(points[-1][1]),
                median=_number(median_of_last(points, LAST)),
                count=min(LAST, len(points)),
            )
            charts.append(LineChart(title, lead, words, points))
    return charts


def _number(value: float | None) -> str:
    return f"{value:.3g}" if known(value) and value < 1000 else f"{value or 0:,.0f}"


def _share(value: float | None) -> str:
    return MISSING if value is None else percent(value, 1)


def _by_image(samples: Mapping[int, Sequence[GalleryItem]]) -> list[SampledImage]:
    """Samples in the order of the newest ones; images that these lack are left out."""
    newest = samples[max(samples)] if samples else []
    images = []
    for image in newest:
        made = [(step, item) for step in sorted(samples)
                for item in samples[step] if item.key == image.key]  # fmt: skip
        images.append(SampledImage(image.key, image.original, image.target, made))
    return images
