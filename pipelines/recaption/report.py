"""Gathers what the report of a caption table shows, and writes it into the table's folder."""

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
from pipelines.recaption.card import settings_told, write_card
from pipelines.recaption.health import REPEATED
from pipelines.recaption.json_file import FILE as JSON_FILE
from pipelines.recaption.page import CaptionReport, CaptionSample, HealthLine, render
from pipelines.recaption.survey import FILE as HEALTH_FILE
from pipelines.recaption.survey import SIMILAR_FILE, Survey
from pipelines.storage.files import as_path, remove_file, write_atomically
from pipelines.storage.tables import Table
from vlv_model.errors import DataError

FILE = "_report.html"  # hidden, as globs of the rows should pass it over
_PARTS, _MOST_PARTS = 32, 256  # that samples are taken from: more where parts are small
_SEARCHED, _SHOWN, _UNHEALTHY = 2000, 18, 3  # rows: to search, to see, and to see of each fault
_FAULTS = {
    "truncated": "ran into generate.max_new_tokens",
    "empty": "no word",
    "repeated": f"{REPEATED:.0%} of the words and more repeat four in a row",
    "non_language": "mostly no letters, or what no text has",
    "duplicates": "nearly the same as that of an earlier image",
}
_COLUMNS = ["key", "name", "caption", "status", "num_words", "truncated", "empty", "repetition",
            "non_language"]  # fmt: skip


def write_report(output: Table, found: Survey, about: Mapping[str, Any]) -> None:
    """Write the page of a table with a survey; `about` as in `_published.json`."""
    rows = _drawn(output)
    gallery: list[dict[str, Any]] = []
    faulty: list[dict[str, Any]] = []
    taken = Counter[str]()
    for row in rows:
        faults = _faults(row)
        if len(gallery) < _SHOWN:
            gallery.append(row)
        elif faults and taken[faults[0]] < _UNHEALTHY:
            taken[faults[0]] += 1
            faulty.append(row)
    images = _images(output, [*gallery, *faulty])
    report = CaptionReport(
        title=f"Captions of {output.folder.name}",
        model=about["model"]["fingerprint"],
        settings=settings_told(about),
        counts=output.counts(),
        captions=found.captions,
        health=[
            HealthLine(name, meaning, getattr(found, name), about["gate"][f"max_{name}"])
            for name, meaning in _FAULTS.items()
        ],
        words=found.words,
        tokens=found.tokens,
        commonest=found.commonest,
        gallery=[_sample(row, images.get(row["key"])) for row in gallery],
        unhealthy=[_sample(row, images.get(row["key"])) for row in faulty],
        searched=[_sample(row) for row in rows],
    )
    write_atomically(output.folder / FILE, render(report))


def forget(output: Table) -> None:
    """Take away what tells of rows beside a table that lost some; its card is written anew."""
    for name in (HEALTH_FILE, SIMILAR_FILE, JSON_FILE, CARD_FILE, FILE):
        remove_file(output.folder / name)
    write_card(output)


def _drawn(output: Table) -> list[dict[str, Any]]:
    """Rows of status ok in random order, the same ones each time, from some parts."""
    draw = np.random.default_rng(0)
    commits = [commit for commit in output.commits() if commit.statuses.get(OK)]
    mixed = [commits[n] for n in draw.permutation(len(commits))[:_MOST_PARTS].tolist()]
    before = accumulate((commit.statuses[OK] for commit in mixed), initial=0)
    chunks = [
        commit.chunk
        for number, (commit, there) in enumerate(zip(mixed, before, strict=False))
        if number < _PARTS or there < _SEARCHED
    ]
    share = -(-_SEARCHED // max(len(chunks), 1))
    rows: list[dict[str, Any]] = []
    for chunk, part in zip(chunks, output.columns(chunks, _COLUMNS), strict=True):
        good = np.flatnonzero(np.array([s == OK for s in part["status"].to_pylist()]))
        chosen = draw.permutation(good)[:share]
        rows += [{**row, "chunk": chunk} for row in part.take(pa.array(chosen)).to_pylist()]
    return [rows[number] for number in draw.permutation(len(rows))[:_SEARCHED].tolist()]


def _faults(row: Mapping[str, Any]) -> list[str]:
    """What a row says of itself; duplicates are known of the whole table only."""
    has = {**row, "repeated": row["repetition"] >= REPEATED}
    return [name for name in _FAULTS if has.get(name)]


def _sample(row: Mapping[str, Any], image: bytes | None = None) -> CaptionSample:
    told = row["key"], row["name"] or str(row["key"]), row["caption"]
    return CaptionSample(*told, faults=_faults(row), words=row["num_words"], image=image)


def _images(output: Table, rows: list[dict[str, Any]]) -> dict[int, bytes]:
    """The images of some rows by key, from where they were captioned; what is gone is left out."""
    found: dict[int, bytes] = {}
    if not has_plan(output.folder):
        return found
    files = [as_path(file) for file in output.describe()["files"]]
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
            except DataError:
                continue
            if content:
                found[key] = content
    return found
