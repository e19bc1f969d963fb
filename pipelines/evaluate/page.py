"""The HTML report of an evaluation: verdicts, figures, curves, distributions, and a gallery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pipelines.evaluate.captions import SEEN
from pipelines.evaluate.comparing import Agreement, Comparison
from pipelines.evaluate.figures import Figure
from pipelines.evaluate.showing import Extremes
from pipelines.report.curve import Curve
from pipelines.report.histogram import Histogram
from pipelines.report.html import page

MEANINGS = {
    "FID": "distance of Inception features to the originals' (Heusel et al. 2017)",
    "KID × 1000": "the same features, unbiased at any number of images (Bińkowski et al. 2018)",
    "CMMD": "distance of CLIP features to the originals' (Jayasumana et al. 2024)",
    "FD-DINOv2": "Fréchet distance of DINOv2 features (Stein et al. 2023)",
    "CLIP score": "100 · cosine of caption and image; a long caption is cut at CLIP's window",
    "CLIP score, by sentence": "mean over the sentences of a caption, each by itself",
    "CLIP score of the worst sentence": "the least of a caption: one invented thing lowers it",
    "share of sentences that CLIP cuts": "those that are longer than its window",
    "share of the caption that CLIP sees": "the rest does not count in the CLIP score",
    "CLIP image cosine": "of each picture and its original",
    "DINOv2 cosine": "of each picture and its original",
    "CIDEr-D": "from 0 to 10, our tokenizer: not comparable with a paper's; says little of long captions",
    "BLEU-4 × 100": "our tokenizer: not comparable with a paper's",
    "words": "length of a caption",
    "aesthetic": "LAION's score",
}
_BINS = 30


@dataclass(frozen=True)
class EvaluationReport:
    """The content of the page."""

    subjects: Sequence[tuple[str, str]]  # name and path
    figures: Sequence[Figure]
    comparisons: Sequence[Comparison] = ()
    subsamples: Sequence[str] = ()
    agreements: Sequence[Agreement] = ()
    gallery: Sequence[Extremes] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def render(report: EvaluationReport) -> str:
    """Render the page as HTML."""
    names = [name for name, _ in report.subjects]
    return page(
        "evaluate/page.html.jinja",
        " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names),
        "How good the captions and pictures are, with intervals: another draw of as many images would move "
        "a figure by about that much.",
        report=report,
        by_measure=_by_measure(report.figures),
        curves=list(_curves(report.figures)),
        histograms=list(_histograms(report.figures)),
        number=number,
        meanings=MEANINGS,
        notes_of=list(_notes(report.figures)),
    )


def number(value: float | None) -> str:
    """Four significant digits, with a real minus sign."""
    if value is None:
        return "–"
    text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return text.replace("-", "−")


def _by_measure(figures: Sequence[Figure]) -> list[tuple[str, list[Figure]]]:
    order = list(dict.fromkeys(figure.measure for figure in figures))
    ordered = sorted(figures, key=lambda figure: order.index(figure.measure))
    return [(name, list(group)) for name, group in groupby(ordered, lambda f: f.measure)]


def _curves(figures: Sequence[Figure]) -> Iterator[Curve]:
    for measure, group in _by_measure(figures):
        lines: dict[str, list[tuple[float, float]]] = {}
        for figure in group:
            if figure.better and figure.guidance is not None:
                lines.setdefault(figure.subject, []).append((figure.guidance, figure.value))
        if any(len(points) > 1 for points in lines.values()):
            ordered = {name: sorted(points) for name, points in lines.items()}
            better = next(figure.better for figure in group if figure.better)
            yield Curve(measure, f"By guidance; {better} is better.", "guidance", ordered)


def _histograms(figures: Sequence[Figure]) -> Iterator[Histogram]:
    """Distributions of the scores; those of fractions are in a unit of which the range holds 30."""
    for figure in figures:
        if figure.scores is None or figure.measure in ("sentences", SEEN) or not figure.of_images:
            continue
        values = figure.scores.values
        spread = float(values.max() - values.min())
        scale = 1.0
        while spread * scale < _BINS and scale < 1000 and figure.measure != "words":
            scale *= 10
        unit = figure.measure if scale == 1 else f"{figure.measure} × {scale:g}"
        counts = Counter(round(value * scale) for value in values.tolist())
        of = f" ({figure.table})" if figure.table else ""
        yield Histogram(
            f"{figure.measure}: {figure.subject}",
            f"One value per image{of}, n = {figure.n:,}.",
            unit,
            counts,
            of="images",
        )


def _notes(figures: Sequence[Figure]) -> Iterator[str]:
    hidden = [figure for figure in figures if figure.measure == SEEN and figure.value < 0.999]
    for figure in hidden:
        yield (
            f"CLIP sees {100 * figure.value:.0f} % of a caption of {figure.subject} on average: what "
            "comes later does not count in its CLIP score."
        )
    exact = [figure for figure in figures if figure.measure.startswith("exact match")]
    failed = sum(sum(figure.made["failed"].values()) for figure in exact)
    if failed:
        yield f"{failed:,} questions have no answer of the reader and count as wrong (answers.jsonl)."
    if any(figure.measure == "FID" and figure.n < 10_000 for figure in figures):
        yield (
            "FID of fewer than 10,000 images is larger than that of many: compare it with FID of as "
            "many images only. KID does not depend on their number."
        )
    sets = {figure.keys for figure in figures if figure.better and figure.of_images}
    if len(sets) > 1:
        yield (
            "The figures do not all rest on the same images (n and key list differ). Comparisons use the "
            "images that both have."
        )
