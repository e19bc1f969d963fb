"""Collects the content of a caption table's report and writes it into the table's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.images.card import FILE as CARD_FILE
from pipelines.images.plans import has_plan, plan_index, read_plan
from pipelines.images.random_access import RowReader
from pipelines.images.rows import OK
from pipelines.recaption.card import settings_shown, write_card
from pipelines.recaption.health import REPEATED
from pipelines.recaption.json_file import FILE as JSON_FILE
from pipelines.recaption.page import CaptionReport, CaptionSample, HealthLine, render
from pipelines.recaption.survey import FILE as HEALTH_FILE
from pipelines.recaption.survey import SIMILAR_FILE, Survey
from pipelines.storage.files import as_path, remove_file, write_atomically
from pipelines.storage.tables import Table
from vlv_model.errors import DataError

FILE = "_report.html"  # underscored, so that globs skip it
_PARTS, _MAX_PARTS = 32, 256  # parts to sample from: more if parts are small
_SEARCHED, _SHOWN, _UNHEALTHY = 2000, 18, 3  # rows: in the search, in the gallery, per fault
_FAULTS = {
    "truncated": "cut at generate.max_new_tokens",
    "empty": "no word",
    "repeated": f"{REPEATED:.0%} or more of the words are in repeated runs of four",
    "non_language": "mostly not letters, or broken characters",
    "duplicates": "nearly the caption of an earlier image",
}
_COLUMNS = ["key", "name", "caption", "status", "num_words", "truncated", "empty", "repetition",
            "non_language"]  # fmt: skip


def write_report(output: Table, survey: Survey, published: Mapping[str, Any]) -> None:
    """Write the report of a surveyed table; `published` as in `_published.json`."""
    rows = _sample_rows(output)
    gallery: list[dict[str, Any]] = []
    faulty: list[dict[str, Any]] = []
    shown = Counter[str]()
    for row in rows:
        faults = _faults(row)
        if len(gallery) < _SHOWN:
            gallery.append(row)
        elif faults and shown[faults[0]] < _UNHEALTHY:
            shown[faults[0]] += 1
            faulty.append(row)
    images = _images(output, [*gallery, *faulty])
    report = CaptionReport(
        title=f"Captions of {output.folder.name}",
        model=published["model"]["fingerprint"],
        settings=settings_shown(published),
        counts=output.counts(),
        captions=survey.captions,
        health=[
            HealthLine(name, meaning, getattr(survey, name), published["gate"][f"max_{name}"])
            for name, meaning in _FAULTS.items()
        ],
        words=survey.words,
        tokens=survey.tokens,
        commonest=survey.commonest,
        gallery=[_sample(row, images.get(row["key"])) for row in gallery],
        unhealthy=[_sample(row, images.get(row["key"])) for row in faulty],
        searched=[_sample(row) for row in rows],
    )
    write_atomically(output.folder / FILE, render(report))


def sample_captions(output: Table, count: int) -> list[tuple[str, str]]:
    """Name and caption of some random rows of status ok, the same ones each time."""
    return [
        (row["name"] or str(row["key"]), row["caption"]) for row in _sample_rows(output)[:count]
    ]


def remove_derived_files(output: Table) -> None:
    """Delete files that describe removed rows, and rewrite the card."""
    delete_derived_files(output)
    write_card(output)


def delete_derived_files(output: Table) -> None:
    """Delete the files that describe rows, the card included.

    The health is the last one: while it is there, the job notices that its rows are not those of the
    table, and deletes the rest after a kill.
    """
    for name in (SIMILAR_FILE, JSON_FILE, CARD_FILE, FILE, HEALTH_FILE):
        remove_file(output.folder / name)


def _sample_rows(output: Table) -> list[dict[str, Any]]:
    """Random rows of status ok from some parts, the same ones each time."""
    rng = np.random.default_rng(0)
    commits = [commit for commit in output.commits() if commit.statuses.get(OK)]
    shuffled = [commits[n] for n in rng.permutation(len(commits))[:_MAX_PARTS].tolist()]
    rows_before = accumulate((commit.statuses[OK] for commit in shuffled), initial=0)
    chunks = [
        commit.chunk
        for number, (commit, before) in enumerate(zip(shuffled, rows_before, strict=False))
        if number < _PARTS or before < _SEARCHED
    ]
    share = -(-_SEARCHED // max(len(chunks), 1))
    rows: list[dict[str, Any]] = []
    for chunk, part in zip(chunks, output.columns(chunks, _COLUMNS), strict=True):
        captioned = np.flatnonzero(np.array([s == OK for s in part["status"].to_pylist()]))
        chosen = rng.permutation(captioned)[:share]
        rows += [{**row, "chunk": chunk} for row in part.take(pa.array(chosen)).to_pylist()]
    return [rows[number] for number in rng.permutation(len(rows))[:_SEARCHED].tolist()]


def _faults(row: Mapping[str, Any]) -> list[str]:
    """The faults recorded in a row, so without duplicates, which only the survey knows."""
    has = {**row, "repeated": row["repetition"] >= REPEATED}
    return [name for name in _FAULTS if has.get(name)]


def _sample(row: Mapping[str, Any], image: bytes | None = None) -> CaptionSample:
    return CaptionSample(
        row["key"],
        row["name"] or str(row["key"]),
        row["caption"],
        faults=_faults(row),
        words=row["num_words"],
        image=image,
    )


def _images(output: Table, rows: list[dict[str, Any]]) -> dict[int, bytes]:
    """The source images of some rows by key; missing ones are left out."""
    images: dict[int, bytes] = {}
    if not has_plan(output.folder):
        return images
    from pipelines.pictures.arrays import png_of
    from pipelines.pictures.decode import DecodeError

    description = output.describe()
    files = [as_path(file) for file in description["files"]]
    encoding = description.get("encoding", "file")
    by_chunk: dict[int, list[int]] = {}
    for row in rows:
        by_chunk.setdefault(row["chunk"], []).append(row["key"])
    for chunk, keys in by_chunk.items():
        plan = read_plan(output.folder, chunk)
        plan = plan.filter(np.isin(plan["key"].to_numpy(), keys))
        reader = RowReader(plan_index(files, plan))
        for position, key in enumerate(plan["key"].to_pylist()):
            try:
                content = reader.row(position)["image"]
                if content and encoding != "file":
                    content = png_of(content, encoding)
            except (DataError, DecodeError):
                continue
            if content:
                images[key] = content
    return images
