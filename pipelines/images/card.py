"""The dataset card of a table: `README.md`, with which the hub and `datasets` open its folder.

    header    files with rows, columns, size: what Hugging Face's `load_dataset` needs
    text      what the table is, how to read it, rows by status, how it was made, its columns

The card is made from the table's own files only, so a takedown can rewrite it without the job. It
contains no path of this machine. The card of a caption table has more: pipelines/recaption/card.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.images.markdown import card, table
from pipelines.images.rows import IMAGE_STRUCT, OK
from pipelines.images.runs import runs_of
from pipelines.storage.files import is_file, read_text, write_atomically
from pipelines.storage.parquet import read_schema
from pipelines.storage.tables import Table

FILE = "README.md"
_METHOD = "the Vision-Language-Vision auto-encoder (arXiv 2507.07104)"
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

    what: str  # the first paragraph
    columns: Mapping[str, str]  # name -> meaning
    header: Mapping[str, Any] = field(default_factory=dict)
    reading: Sequence[str] = ()  # how to read it, in blocks; default: an SQL query
    sections: Sequence[str] = ()
    public: Sequence[str] = ()  # names with an underscore that may be published


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
    text = table_card(output, counts, kind(output, counts))
    if not (exists and read_text(file) == text):
        write_atomically(file, text)


def table_card(output: Table, counts: Mapping[str, int], content: Card) -> str:
    """The text of a table's card."""
    name, rows = output.folder.name, sum(counts.values())
    path, features = path_of(output), _features(output)
    header = {
        "license": None,  # first, as on the hub
        "pretty_name": name,
        "task_categories": None,
        "tags": None,
        "size_categories": [next((size for end, size in _SIZES if rows < end), "n>1T")],
        "base_model": None,
        **content.header,
        "dataset_info": {"features": features},
        # Nothing else in the folder is data.
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
    }
    besides = " and ".join(f"`{file}`" for file in content.public)
    blocks = [
        f"# {name}",
        content.what,
        f"""```python
from datasets import load_dataset

rows = load_dataset("{path}", split="train")  # streaming=True makes no copy
```""",
        f"""```python
import pandas, polars, ray

pandas.read_parquet("{path}/data")
polars.scan_parquet("{path}/data/*.parquet")
ray.data.read_parquet("{path}/data")  # Spark: spark.read.parquet("{path}/data")
```""",
        *(content.reading or [_sql(path)]),
        "Only `data/` contains rows. Names with an underscore belong to the job, and `_table.json` contains "
        "the paths of its input: do not publish them"
        + (f", except {besides}." if besides else "."),
        "## Rows by status",
        table(("status", "rows"), [(status, f"{n:,}") for status, n in counts.items()]),
        *content.sections,
        "## Columns",
        table(
            ("column", "type", "meaning"),
            [(f"`{f['name']}`", f["dtype"], content.columns.get(f["name"], "")) for f in features],
        ),
    ]
    return card(header, blocks)


def path_of(output: Table) -> str:
    """The path of the table in the card's examples."""
    return f"path/to/{output.folder.name}"


def _features(output: Table) -> list[dict[str, str]]:
    """The columns of the parts with their `datasets` types.

    Given explicitly because types cannot be inferred from a part without rows or with nulls only.
    """
    return [
        {"name": f.name, "dtype": _HUB_TYPES.get(str(f.type), str(f.type))}
        for f in read_schema(output.part(0))
    ]


def _sql(path: str) -> str:
    return f"""```sql
-- DuckDB
select status, count(*) from '{path}/data/*.parquet' group by status;
```"""


# ------------------------------------------------------------------------------------- kinds


def _settings(output: Table, more: Mapping[str, Any] | None = None) -> list[str]:
    """The section on how the table was made: the settings that decide its rows."""
    found: dict[str, Any] = {}
    for name, value in {**output.describe()["identity"], **(more or {})}.items():
        if name in _OMITTED_SETTINGS or value in (None, [], {}):
            continue
        found |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return ["## How it was made", table(("setting", "value"), list(found.items()))]


def _image_card(output: Table, counts: Mapping[str, int]) -> Card:
    runs = [run.describe() for run in runs_of(output)]
    settings = _settings(output, runs[-1]["settings"] if runs else None)
    lines = [
        (
            run["number"],
            f"{run['read']:,}",
            f"{sum(run['dropped'].values()):,}",
            f"{run['fetched']:,}",
        )
        for run in runs
        if "read" in run
    ]
    if lines:
        settings += [table(("run", "rows of the list", "dropped by metadata", "downloaded"), lines)]
    return Card(
        what=f"{counts.get(OK, 0):,} usable images, of {sum(counts.values()):,} URLs. Use the rows whose `status` is "
        "`ok`. The others say why there is no image, or why it should not be used: duplicates (`duplicate`) "
        "and images that a filter rejects (`filtered:…`) are kept. The images are works of others: `license` "
        "and `source` come from the list.",
        columns=_IMAGE_COLUMNS,
        header={"tags": ["vlv"]},
        sections=settings,
        public=["_report.html"],
    )


def _pair_card(output: Table, counts: Mapping[str, int]) -> Card:
    return Card(
        what=f"{counts.get(OK, 0):,} images, each with a caption from which a captioner learns, in stage 2 of "
        f"{_METHOD}. The images are works of others: `license` and `source` come from the list.",
        columns=_IMAGE_COLUMNS,
        header={"task_categories": ["image-to-text"], "tags": ["vlv"]},
        sections=_settings(output),
    )


def _latent_card(output: Table, counts: Mapping[str, int]) -> Card:
    shape = output.describe()["identity"].get("latent_shape", [])
    decode = f"""```python
import numpy as np, torch

row = next(row for row in rows if row["status"] == "ok")  # null in the others
words = np.frombuffer(row["mean"], "<i2").copy()
mean = torch.from_numpy(words).view(torch.bfloat16).view({", ".join(map(str, shape))})
```"""
    return Card(
        what=f"The VAE's latent distributions of {counts.get(OK, 0):,} of {sum(counts.values()):,} images. Stage 1 "
        f"of {_METHOD} reads them instead of the images.",
        columns=COLUMNS
        | {
            "mean": f"bfloat16, little-endian, of shape {shape} (channels, height, width)",
            "deviation": "the standard deviation, in the same format",
        },
        header={"tags": ["vlv"]},
        reading=[decode],
        sections=_settings(output),
    )


def _picture_card(output: Table, counts: Mapping[str, int]) -> Card:
    return Card(
        what=f"{counts.get(OK, 0):,} images generated by a frozen diffusion model from the caption embeddings of "
        f"{sum(counts.values()):,} images, by {_METHOD}. None is a photograph.",
        columns=COLUMNS
        | {"image": "the generated image, a PNG file; null if the status is not ok"},
        header={"tags": ["vlv", "arxiv:2507.07104", "synthetic"]},
        sections=_settings(output),
    )


_KINDS: dict[str, Callable[[Table, Mapping[str, int]], Card]] = {
    "image": _image_card,
    "pair": _pair_card,
    "latents": _latent_card,
    "reconstruction": _picture_card,
}
