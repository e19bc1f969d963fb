"""Evaluation: finds tables, computes every figure that they permit, and writes one report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.evaluate.captions import caption_figures, clip_score_figures, read_references
from pipelines.evaluate.comparing import (
    Agreement,
    Comparison,
    captions_agree,
    compare_all,
    compare_subsamples,
)
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.figures import Figure
from pipelines.evaluate.page import EvaluationReport, render
from pipelines.evaluate.pictures import Gathered, check_same_extractor, picture_figures
from pipelines.evaluate.showing import gallery_of
from pipelines.evaluate.subjects import ANSWERS, Subject, find_subject, names_of
from pipelines.images.features import FeatureTable
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.parquet import write_parquet
from pipelines.storage.tables import (
    check_same_settings,
    check_unused,
    parquet_files,
    read_json_object,
)
from vlv_model.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pipelines.evaluate.by_sentence import SentenceScores

REPORT, PAGE, SCORES = "report.json", "report.html", "scores.parquet"
_NOT_DECIDING = ("concurrency", "timeout_seconds", "retries", "pause_seconds", "max_requests",
                 "max_failed")  # fmt: skip
_TEXT, _IMAGE = "clip-text", "clip"


def evaluate(config: EvaluateConfig) -> str:
    """Write the report unless it exists; returns the lines to print.

    Raises DataError if a table is missing, not finished, or made by another extractor than the one it
    is held against, RunError if the folder holds another evaluation.
    """
    subjects = [
        find_subject(path, name)
        for path, name in zip(config.input, names_of(config.input), strict=True)
    ]
    originals = (
        None
        if config.data.originals is None
        else find_subject(config.data.originals, "originals", "data.originals")
    )
    for subject in subjects:  # before the first pass over a table
        for table in subject.features.values():
            _original_of(table, originals)
    if config.dry_run:
        return "\n".join(_plan(config, subjects, originals))
    output = Path(config.output)
    identity = _identity(config, subjects, originals)
    if is_file(output / REPORT):
        recorded = read_json_object(output / REPORT)
        check_same_settings(output, recorded.get("made_of", {}), identity, "output")
        return "evaluated already: nothing to do"
    check_unused(output, [PAGE, SCORES, ANSWERS], "evaluation", "output")

    figures = list(_figures(config, subjects, originals))
    if not figures:
        raise DataError(
            "these tables permit no figure: feature tables need data.originals, the features of the "
            "images that the pictures or captions were made of"
        )
    comparisons = compare_all(figures, config.measure)
    agreements = _agreements(config, subjects)
    report = EvaluationReport(
        subjects=[(subject.name, subject.path) for subject in subjects],
        figures=figures,
        comparisons=comparisons,
        subsamples=compare_subsamples(figures),
        agreements=agreements,
        gallery=gallery_of(comparisons, subjects, config),
        settings=_settings(config),
    )
    write_parquet(output / SCORES, _scores(figures))
    write_atomically(output / PAGE, render(report))
    content = {
        "made_of": identity,
        "figures": [figure.to_json() for figure in figures],
        "comparisons": [comparison.to_json() for comparison in comparisons],
        "agreements": [{**vars(a), "same_words": vars(a.same_words)} for a in agreements],
    }
    # The last file: a report that exists is complete.
    write_atomically(output / REPORT, json.dumps(content, indent=2) + "\n")
    return "\n".join(_lines(figures, comparisons, report.subsamples))


def _figures(
    config: EvaluateConfig, subjects: list[Subject], originals: Subject | None
) -> Iterator[Figure]:
    gathered: dict[str, Gathered] = {}  # an original is read once for all that is held against it
    references = None if config.data.references is None else read_references(config.data.references)
    by_sentence = _sentence_scores(config, originals)
    for subject in subjects:
        for label, captions in subject.captions.items():
            yield from caption_figures(subject.name, label, captions, references, config.measure)
            if by_sentence is not None:
                yield from by_sentence.figures(
                    subject.name, label, captions.captions, config.measure
                )
        for label, table in subject.features.items():
            original = _original_of(table, originals)
            if table.extractor.get("extractor") == _TEXT:
                if original is not None:
                    yield from clip_score_figures(
                        subject.name, label, table, original, config.measure
                    )
                continue
            if original is not None and original.path not in gathered:
                gathered[original.path] = Gathered.of(original, config.measure.sample_rows)
            pair = None if original is None else (original, gathered[original.path])
            yield from picture_figures(subject.name, label, table, pair, config.measure)
    if config.ask.questions is not None:
        from pipelines.evaluate.questions.figures import question_figures  # aiohttp

        yield from question_figures(config, subjects)


def _sentence_scores(config: EvaluateConfig, originals: Subject | None) -> SentenceScores | None:
    if config.clip.weights is None:
        return None
    images = [] if originals is None else [*originals.features.values()]
    fitting = [table for table in images if table.extractor.get("extractor") == _IMAGE]
    if not fitting:
        raise ConfigError(
            "clip.weights needs data.originals with features of clip: embed the original images "
            "(jobs/embed.py embed.extractor=clip)"
        )
    from pipelines.evaluate.by_sentence import SentenceScores  # torch

    return SentenceScores(config.clip, fitting[0])


def _original_of(table: FeatureTable, originals: Subject | None) -> FeatureTable | None:
    """The table that `table` is held against; DataError if there are originals and none fits."""
    if originals is None or table.width is None:
        return None
    kind = table.extractor.get("extractor")
    wanted = _IMAGE if kind == _TEXT else kind
    fitting = [
        original
        for original in originals.features.values()
        if original.extractor.get("extractor") == wanted
    ]
    if not fitting:
        raise DataError(
            f"data.originals={originals.path} has no features of {wanted}, which {table.path} is held "
            "against: embed the original images with the same settings"
        )
    if kind == _TEXT:
        weights = table.extractor.get("weights")
        same = [original for original in fitting if original.extractor.get("weights") == weights]
        return (same or fitting)[0]
    for original in fitting:
        if original.extractor == table.extractor:
            return original
    check_same_extractor(table, fitting[0])
    return fitting[0]


def _agreements(config: EvaluateConfig, subjects: list[Subject]) -> list[Agreement]:
    captioners = [
        (subject.name, table) for subject in subjects for table in subject.captions.values()
    ]
    found = [captions_agree(captioners[0], other, config.measure) for other in captioners[1:]]
    return [one for one in found if one is not None]


def _plan(
    config: EvaluateConfig, subjects: list[Subject], originals: Subject | None
) -> Iterator[str]:
    most = 0
    for subject in [*subjects, *([originals] if originals else [])]:
        yield f"{subject.name}: {subject.path}"
        for label, table in subject.features.items():
            kind = table.extractor.get("extractor", "?")
            yield f"  {label or '.'}: {table.rows:,} features of {kind}, {table.width or 0:,} wide"
            width = table.width or 0
            held = min(table.rows, 2 * config.measure.sample_rows)
            most = max(most, 4 * width * held + 8 * 6 * width * width + 8 * table.rows)
        for label, captions in subject.captions.items():
            files = len(captions.files)
            yield f"  {label or '.'}: captions in {files:,} file{'s' if files != 1 else ''}"
    yield f"memory: about {2 * most / 1e9 + 0.3:.1f} GB; no GPU, no Ray"


def _identity(
    config: EvaluateConfig, subjects: list[Subject], originals: Subject | None
) -> dict[str, Any]:
    files: dict[str, Path] = {}
    for number, subject in enumerate([*subjects, *([originals] if originals else [])]):
        for label, features in subject.features.items():
            files |= {f"{number}/{label}/{file.name}": file for file in features.files}
        for label, captions in subject.captions.items():
            files |= {f"{number}/{label}/{file.name}": file for file in captions.files}
    if config.data.references is not None:
        found = parquet_files(config.data.references, "data.references")
        files |= {f"references/{file.name}": file for file in found}
    return {**_settings(config), "files": size_fingerprint(files)}


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    dumped = config.model_dump(mode="json", exclude={"output", "dry_run"})
    flat = {f"data.{name}": value for name, value in dumped.pop("data").items()}
    flat |= {f"clip.{name}": value for name, value in dumped.pop("clip").items()}
    # What only decides how fast and at what cost the same answers come may differ in a rerun.
    asked = {k: v for k, v in dumped.pop("ask").items() if k not in _NOT_DECIDING}
    flat |= {f"ask.{name}": value for name, value in asked.items()}
    flat |= {f"measure.{name}": value for name, value in dumped.pop("measure").items()}
    return {**dumped, **flat}


def _scores(figures: list[Figure]) -> pa.Table:
    scored = [figure for figure in figures if figure.scores is not None]
    schema = pa.schema(
        [
            ("subject", pa.string()),
            ("table", pa.string()),
            ("measure", pa.string()),
            ("key", pa.int64()),
            ("value", pa.float64()),
        ]
    )
    tables = []
    for figure in scored:
        assert figure.scores is not None
        n = len(figure.scores.keys)
        names = [pa.array(np.full(n, text, object), pa.string()) for text in
                 (figure.subject, figure.table, figure.measure)]  # fmt: skip
        tables.append(pa.table([*names, figure.scores.keys, figure.scores.values], schema=schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _lines(
    figures: Sequence[Figure], comparisons: Sequence[Comparison], subsamples: Sequence[str]
) -> Iterator[str]:
    for figure in figures:
        ends = "" if figure.low is None else f" ({figure.low:.4g} to {figure.high:.4g})"
        name = f"{figure.subject}{'/' if figure.table else ''}{figure.table}"
        yield f"{name}: {figure.measure} {figure.value:.4g}{ends}, n {figure.n:,}"
    for comparison in comparisons:
        yield f"{comparison.measure}: {comparison.verdict}"
    yield from subsamples
