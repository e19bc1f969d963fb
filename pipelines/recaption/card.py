"""The dataset card of a caption table: that of any table (pipelines.images.card) and caption sections.

Model and settings come from `_published.json`, counts from `_health.json`, so a takedown can rewrite
the card without the job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.images.card import COLUMNS, FILE, Card, table_card
from pipelines.images.markdown import plain
from pipelines.images.rows import OK
from pipelines.recaption.health import REPEATED
from pipelines.recaption.survey import SIMILAR_FILE, Survey
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.tables import PUBLISHED_FILE, Table, read_json_object
from vlv_model.checkpoints.digests import short
from vlv_model.checkpoints.files import read_checkpoint
from vlv_model.checkpoints.layouts import DENOISERS
from vlv_model.checkpoints.sources import part_source
from vlv_model.config import ModelConfig

_SAMPLES = 8
_SHOWN = 300  # characters of a sample
_COLUMNS = COLUMNS | {
    "key": "key of the image in its source table",
    "name": "file name or URL of the image",
    "caption": "null if the status is not ok",
    "num_tokens": "tokens of the decoded caption, without the end-of-text",
    "finish_reason": "`stop`: the model ended it; `length`: it was cut",
    "num_words": "words of the caption",
    "truncated": "whether the caption was cut at the token limit",
    "empty": "whether the caption has no word",
    "repetition": "share of its words that repeat an earlier run of four words",
    "non_language": "whether most characters are not letters",
    "model": "fingerprint of the weights and all settings that affect captions",
    "status": "`ok`, or why there is no caption",
    "image": "the captioned image, with its name as path",
}


def model_notes(model: ModelConfig, checkpoint: Path, fingerprint: str) -> dict[str, Any]:
    """The model in a card, without local paths."""
    info = read_checkpoint(checkpoint)
    # An export's checkpoint.json also names VAE and denoiser, which a captioner does not have.
    parts = [part for part in info.base_models if part not in ("vae", *DENOISERS)]
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
    """Write or rewrite the card of a published table."""
    if is_file(output.folder / PUBLISHED_FILE):
        published = read_json_object(output.folder / PUBLISHED_FILE)
        write_atomically(output.folder / FILE, caption_card(output, published))


def caption_card(output: Table, published: Mapping[str, Any]) -> str:
    """The card as Markdown; `published` is the content of `_published.json`."""
    counts, model, health = output.counts(), published["model"], Survey.read(output)
    sources = {source for source, _ in model["base_models"].values() if source}
    parts = [
        ("captioner", f"step {model['step']:,}", f"sha256:{model['weights'][:12]}"),
        *((p, s or "a folder", short(f)) for p, (s, f) in model["base_models"].items()),
    ]
    card = Card(
        "recaption/card.md.jinja",
        _COLUMNS,
        header={
            "license": published["license"],
            "task_categories": ["image-to-text"],
            "tags": ["vlv", "arxiv:2507.07104", "synthetic"],
            "base_model": sorted(sources),
        },
        values={
            "join": published["join"],
            "similar_file": SIMILAR_FILE,
            "health": _health(health) if health else [],
            "parts": parts,
            "fingerprint": model["fingerprint"],
            "settings": [*_preprocessing(model), *settings_shown(published)],
            "samples": list(_samples(output)),
        },
    )
    return table_card(output, counts, card)


def settings_shown(published: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings and values for display, without unset gates."""
    decoding = [(f"generate.{name}", value) for name, value in published["generate"].items()]
    gates = [(f"gate.{n}", f"{v:.2%}") for n, v in published["gate"].items() if v is not None]
    return [*((n, "none" if v is None else str(v)) for n, v in decoding), *gates]


def _preprocessing(model: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, model[name]) for name in ("image_size", "preprocess") if name in model]


def _health(health: Survey) -> list[tuple[str, str, str]]:
    faults = {
        "truncated at the length limit": health.truncated,
        "empty": health.empty,
        f"repeating themselves (`repetition` of at least {REPEATED:.0%})": health.repeated,
        "non-language": health.non_language,
        f"similar to the caption of an earlier row (keys in `{SIMILAR_FILE}`)": health.duplicates,
    }
    total = max(health.captions, 1)
    return [(fault, f"{n:,}", f"{n / total:.2%}") for fault, n in faults.items()]


def _samples(output: Table) -> Iterator[tuple[str, str]]:
    """Captions from evenly spaced parts of the table."""
    commits = [commit for commit in output.commits() if commit.statuses.get(OK)]
    indices = np.linspace(0, len(commits) - 1, min(_SAMPLES, len(commits))).astype(int)
    parts = output.columns([commits[i].chunk for i in indices], ["name", "caption", "status"])
    for number, part in enumerate(parts):
        captioned = [row for row in part.to_pylist() if row["status"] == OK]
        share = -(-_SAMPLES // len(indices)) if number == 0 else _SAMPLES // len(indices)
        for row in captioned[: max(share, 1)]:
            text = row["caption"]
            text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
            yield plain(row["name"]), plain(text)
