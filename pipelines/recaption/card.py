"""The card of a caption table: what pipelines/images/card.py says of any table, and what is known of captions.

`_published.json` has the model and the settings, `_health.json` the counts; so a takedown writes the
card anew without the job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.images.card import COLUMNS, FILE, Card, path_of, table_card
from pipelines.images.markdown import plain, table
from pipelines.images.rows import OK
from pipelines.recaption.health import REPEATED
from pipelines.recaption.survey import SIMILAR_FILE, Survey
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.tables import PUBLISHED_FILE, Table, read_json_object
from vlv_model.checkpoints.files import read_checkpoint
from vlv_model.checkpoints.fingerprint import short
from vlv_model.checkpoints.sources import part_source
from vlv_model.config import ModelConfig

_SAMPLES = 8
_SHOWN = 300  # characters of a sample
_COLUMNS = COLUMNS | {
    "key": "the image, as in the table that it comes from",
    "name": "its file name or URL",
    "caption": "null where the status is not ok",
    "num_tokens": "tokens of the decoded caption, without the end-of-text",
    "finish_reason": "`stop`: the model ended it; `length`: it was cut",
    "num_words": "words of the caption",
    "truncated": "whether decoding was cut",
    "empty": "whether there is no word in it",
    "repetition": "share of its words that repeat an earlier run of four words",
    "non_language": "whether it is mostly no letters",
    "model": "fingerprint of the weights and of all settings that decide a caption",
    "status": "`ok`, or why there is no caption",
    "image": "the image as it was captioned from, with its name as path",
}


def model_notes(model: ModelConfig, checkpoint: Path, fingerprint: str) -> dict[str, Any]:
    """What a card says of the model: no path of the machine that it lay on."""
    from vlv_model.captioner import VLVCaptioner

    info = read_checkpoint(checkpoint)
    # An export names VAE and UNet, too, upon which its encoder was trained, and has no folder of theirs.
    parts = [part for part in info.base_models if part in VLVCaptioner.base_parts]
    return {
        "fingerprint": fingerprint,
        "weights": info.sha256,
        "step": info.step,
        "image_size": model.image_size,
        **({"preprocess": model.preprocess} if model.preprocess != "default" else {}),
        "base_models": {
            part: [part_source(model, part).repo, info.base_models[part]] for part in parts
        },
    }


def write_card(output: Table) -> None:
    """Write the card of a published table anew."""
    if is_file(output.folder / PUBLISHED_FILE):
        about = read_json_object(output.folder / PUBLISHED_FILE)
        write_atomically(output.folder / FILE, caption_card(output, about))


def caption_card(output: Table, about: Mapping[str, Any]) -> str:
    """The card's text; `about` is what `_published.json` says."""
    counts, model, found = output.counts(), about["model"], Survey.read(output)
    sources = {source for source, _ in model["base_models"].values() if source}
    joined = ", each with its image" if about["join"] else ""
    parts = [
        ("captioner", f"step {model['step']:,}", f"sha256:{model['weights'][:12]}"),
        *((p, s or "a folder", short(f)) for p, (s, f) in model["base_models"].items()),
    ]
    told = Card(
        what=f"{counts.get(OK, 0):,} captions of {sum(counts.values()):,} images{joined}, written by a model "
        "(Vision-Language-Vision auto-encoder, arXiv 2507.07104) and checked by no person: what is "
        "known of them stands under Health.",
        columns=_COLUMNS,
        header={
            "license": about["license"],
            "task_categories": ["image-to-text"],
            "tags": ["vlv", "arxiv:2507.07104", "synthetic"],
            "base_model": sorted(sources),
        },
        reading=[_questions(path_of(output), found is not None)],
        sections=[
            "## Health",
            *_health(found),
            "## Model",
            table(("part", "from", "fingerprint"), parts),
            f"`model` in every row is `{model['fingerprint']}`.",
            "## Settings",
            table(("setting", "value"), [*_cut(model), *settings_told(about)]),
            "## Samples",
            table(("name", "caption"), list(_samples(output))),
        ],
        public=[SIMILAR_FILE, "_report.html"] if found else [],
    )
    return table_card(output, counts, told)


def settings_told(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings and values as a reader sees them; gates that are not set are left out."""
    decoding = [(f"generate.{name}", value) for name, value in about["generate"].items()]
    gates = [(f"gate.{n}", f"{v:.2%}") for n, v in about["gate"].items() if v is not None]
    return [*((n, "none" if v is None else str(v)) for n, v in decoding), *gates]


def _questions(path: str, with_similar: bool) -> str:
    """SQL for what one asks of captions first."""
    similar = f"""
-- without those that are similar to an earlier one:
select name, caption from '{path}/data/*.parquet' where status = 'ok'
and key not in (select key from read_csv('{path}/{SIMILAR_FILE}', types={{'key': 'bigint'}}));"""
    return f"""```sql
-- DuckDB: captions by name
select name, caption from '{path}/data/*.parquet' where status = 'ok';{similar * with_similar}
-- with the images, where they lie in a table with the same keys:
select c.key, c.caption, i.image
from '{path}/data/*.parquet' c join 'path/to/images/data/*.parquet' i using (key);
```"""


def _cut(model: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """How images became the squares that the captioner saw."""
    return [(name, model[name]) for name in ("image_size", "preprocess") if name in model]


def _health(found: Survey | None) -> Iterator[str]:
    if found is None:
        yield "Not looked at since rows were taken out."
        return
    told = {
        "truncated at the length limit": found.truncated,
        "empty": found.empty,
        f"repeating themselves (`repetition` of {REPEATED:.0%} and more)": found.repeated,
        "non-language": found.non_language,
        f"similar to the caption of an earlier row (`{SIMILAR_FILE}` has their keys)": found.duplicates,
    }
    whole = max(found.captions, 1)
    yield table(
        ("captions that are", "rows", "share"),
        [(what, f"{n:,}", f"{n / whole:.2%}") for what, n in told.items()],
    )


def _samples(output: Table) -> Iterator[tuple[str, str]]:
    """Captions from parts that lie evenly over the table."""
    commits = [commit for commit in output.commits() if commit.statuses.get(OK)]
    places = np.linspace(0, len(commits) - 1, min(_SAMPLES, len(commits))).astype(int)
    parts = output.columns([commits[p].chunk for p in places], ["name", "caption", "status"])
    for number, part in enumerate(parts):
        good = [row for row in part.to_pylist() if row["status"] == OK]
        share = -(-_SAMPLES // len(places)) if number == 0 else _SAMPLES // len(places)
        for row in good[: max(share, 1)]:
            text = row["caption"]
            text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
            yield plain(row["name"]), plain(text)
