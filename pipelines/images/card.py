"""The dataset card of a table: `README.md`, with which the hub and `datasets` open its folder.

    header    files with rows, columns, size: what Hugging Face's `load_dataset` needs
    text      what the table is, how to read it, rows by status, how it was made, its columns

The card is made from the table's own files only, so a takedown can rewrite it without the job. It
contains no path of this machine. The card of a caption table has more: pipelines/recaption/card.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.images.markdown import card
from pipelines.images.rows import IMAGE_STRUCT, OK
from pipelines.images.runs import runs_of
from pipelines.storage.files import is_file, read_text, write_atomically
from pipelines.storage.parquet import read_schema
from pipelines.storage.tables import Table

FILE = "README.md"
# The hub's size categories and their upper bounds.
_SIZES = [(1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"),
          (1e7, "1M<n<10M"), (1e8, "10M<n<100M"), (1e9, "100M<n<1B")]  # fmt: skip
# Type names of `datasets` where they differ from Arrow's.
_HUB_TYPES = {str(IMAGE_STRUCT): "image", "float": "float32", "double": "float64"}
# Settings about where the input lies and how it is divided, which do not decide the rows.
_OMITTED_SETTINGS = (
    "data.input",
    "data.captions",
    "data.columns",
    "files",
    "rows",
    "layout",
    "plan",
    "retry",
)

COLUMNS = {
    "key": "identifies the image: a hash of its URL, or the key in the source table",
    "status": "`ok`, or why the row should not be used",
    "error": "the reason in words",
}
_IMAGE_COLUMNS = COLUMNS | {
    "url": "where it was downloaded from",
    "alt_text": "the alt text in the list",
    "similarity": "CLIP similarity of image and text, from the list",
    "pwatermark": "probability of a watermark, from the list",
    "punsafe": "probability that it is unsafe, from the list",
    "aesthetic": "aesthetic score, from the list",
    "hash": "the hash in the list",
    "license": "its licence, from the list",
    "source": "its origin, from the list",
    "image": "the stored image: bytes of an image file",
    "width": "of the stored image, in pixels",
    "height": "of the stored image, in pixels",
    "original_width": "of the downloaded image, in pixels",
    "original_height": "of the downloaded image, in pixels",
    "sha256": "digest of the downloaded bytes",
    "phash": "perceptual hash: near-duplicates differ in few bits",
    "run": "number of the ingest run that downloaded it",
    "caption": "the caption that a captioner learns",
}


@dataclass(frozen=True)
class Card:
    """The specific parts of a card; `table_card` adds what all tables share."""

    template: str  # extends images/cards/table.md.jinja
    columns: Mapping[str, str]  # name -> meaning
    header: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)  # of the template


def write_card(output: Table, counts: Mapping[str, int] | None = None) -> None:
    """Write the card of a finished table, or update an existing one.

    `counts` are its rows by status, if known. A table of an earlier version, whose parts lie beside its
    `_table.json`, gets no card: Arrow would read it as a part. The recaption job writes the card of a
    caption table.
    """
    description = output.describe()
    kind = _KINDS.get(description["kind"])
    if kind is None or not description.get("parts") or not is_file(output.part(0)):
        return
    file = output.folder / FILE
    exists = is_file(file)
    if not exists and output.pending():
        return
    counts = output.counts() if counts is None else counts
    text = table_card(output, counts, kind(output))
    if not (exists and read_text(file) == text):
        write_atomically(file, text)


def table_card(output: Table, counts: Mapping[str, int], content: Card) -> str:
    """The text of a table's card."""
    from huggingface_hub import DatasetCardData

    name, rows, features = output.folder.name, sum(counts.values()), _features(output)
    path = f"path/to/{name}"
    header = DatasetCardData(
        pretty_name=name,
        size_categories=[next((size for end, size in _SIZES if rows < end), "n>1T")],
        dataset_info={"features": features},
        # Nothing else in the folder is data.
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
        **{key: value for key, value in content.header.items() if value},
    )
    return card(
        header,
        content.template,
        name=name,
        path=path,
        sql_path=path.replace("'", "''"),
        ok=f"{counts.get(OK, 0):,}",
        total=f"{rows:,}",
        counts=[(status, f"{n:,}") for status, n in counts.items()],
        columns=[
            (f"`{f['name']}`", _type_words(f), content.columns.get(f["name"], "")) for f in features
        ],
        **content.values,
    )


def _features(output: Table) -> list[dict[str, Any]]:
    """The columns of the parts with their `datasets` types.

    Given explicitly because types cannot be inferred from a part without rows or with nulls only.
    """
    return [_feature(field) for field in read_schema(output.part(0))]


def _feature(column: pa.Field) -> dict[str, Any]:
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        inner = str(kind.value_type)
        return {"name": column.name, "list": _HUB_TYPES.get(inner, inner), "length": kind.list_size}
    return {"name": column.name, "dtype": _HUB_TYPES.get(str(kind), str(kind))}


def _type_words(feature: Mapping[str, Any]) -> str:
    if "dtype" in feature:
        return str(feature["dtype"])
    return f"list of {feature['length']} {feature['list']}"


# ------------------------------------------------------------------------------------- kinds


def _settings(output: Table, more: Mapping[str, Any] | None = None) -> list[tuple[str, Any]]:
    """The settings that decide the table's rows."""
    found: dict[str, Any] = {}
    for name, value in {**output.describe()["identity"], **(more or {})}.items():
        if name in _OMITTED_SETTINGS or value in (None, [], {}):
            continue
        found |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return list(found.items())


def _image_card(output: Table) -> Card:
    runs = [run.describe() for run in runs_of(output)]
    lines = [
        (
            run["number"],
            f"{run['read']:,}",
            f"{sum(run['dropped'].values()):,}",
            f"{run['fetched']:,}",
            f"{run.get('again', 0):,}",
        )
        for run in runs
        if "read" in run
    ]
    settings = _settings(output, runs[-1]["settings"] if runs else None)
    return Card(
        "images/cards/image.md.jinja",
        _IMAGE_COLUMNS,
        {"tags": ["vlv"]},
        {"settings": settings, "runs": lines},
    )


def _pair_card(output: Table) -> Card:
    header = {"task_categories": ["image-to-text"], "tags": ["vlv"]}
    settings = {"settings": _settings(output)}
    return Card("images/cards/pair.md.jinja", _IMAGE_COLUMNS, header, settings)


def _latent_card(output: Table) -> Card:
    shape = output.describe()["identity"].get("latent_shape", [])
    columns = COLUMNS | {
        "mean": f"bfloat16, little-endian, of shape {shape} (channels, height, width)",
        "deviation": "the standard deviation, in the same format",
    }
    values = {"settings": _settings(output), "shape": shape}
    return Card("images/cards/latents.md.jinja", columns, {"tags": ["vlv"]}, values)


def _picture_card(output: Table) -> Card:
    return Card(
        "images/cards/reconstruction.md.jinja",
        COLUMNS | {"image": "the generated image, a PNG file; null if the status is not ok"},
        {"tags": ["vlv", "arxiv:2507.07104", "synthetic"]},
        {"settings": _settings(output)},
    )


def _feature_card(output: Table) -> Card:
    columns = COLUMNS | {
        "name": "file name or URL of the image, or the key",
        "features": "the vector; null if the status is not ok",
        "aesthetic": "LAION's aesthetic score, about 1 to 10",
        "seen": "share of the caption's tokens that the text encoder's window holds",
        "duplicate": "largest cosine with a row of a smaller key, above the bound; else 0",
    }
    described = output.describe()
    return Card(
        "images/cards/features.md.jinja",
        columns,
        {"tags": ["vlv"]},
        {
            "settings": _settings(output),
            "extractor": described["identity"].get("embed.extractor"),
            "versions": list(described.get("versions", {}).items()),
            "vectors": "features" in read_schema(output.part(0)).names,
        },
    )


_KINDS: dict[str, Callable[[Table], Card]] = {
    "image": _image_card,
    "pair": _pair_card,
    "latents": _latent_card,
    "features": _feature_card,
    "reconstruction": _picture_card,
}
