"""The card of a table: `README.md`, by which the hub and Hugging Face `datasets` open its folder.

    header    which files hold rows, their columns, how many rows there are: what `load_dataset` needs
    text      what the table is, how to read it, rows by status, how it was made, its columns

All of it comes from the table's own files, so a takedown writes the card again without the job. It
names no path of the machine. A caption table's card says more: pipelines/recaption/card.py.
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
# The hub's names of sizes, by their upper ends.
_SIZES = [(1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"),
          (1e7, "1M<n<10M"), (1e8, "10M<n<100M"), (1e9, "100M<n<1B")]  # fmt: skip
# The names of types in `datasets`; the others are named as Arrow names them.
_HUB_TYPES = {str(IMAGE_STRUCT): "image", "float": "float32", "double": "float64"}
# Settings that say where the input lay and how it was cut, not what a row is.
_NO_SETTINGS = (
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
    "key": "the image: a hash of its URL, or as in the table that it comes from",
    "status": "`ok`, or why the row is not to be used",
    "error": "why, in words",
}
_IMAGE_COLUMNS = COLUMNS | {
    "url": "where it was fetched",
    "alt_text": "what the list says of it",
    "similarity": "the list's score: image and text, by CLIP",
    "pwatermark": "the list's score: probability of a watermark",
    "punsafe": "the list's score: probability that it is unsafe",
    "aesthetic": "the list's score of its looks",
    "hash": "the list's own hash",
    "license": "its licence, as the list names it",
    "source": "where the list has it from",
    "image": "the picture as it is stored: bytes of an image file",
    "width": "pixels of the stored picture",
    "height": "pixels of the stored picture",
    "original_width": "pixels of the picture as it was fetched",
    "original_height": "pixels of the picture as it was fetched",
    "sha256": "digest of the bytes that were fetched",
    "phash": "perceptual hash: near copies differ in few bits",
    "run": "number of the ingest that fetched it",
    "caption": "what a captioner is to learn to say of it",
}


@dataclass(frozen=True)
class Card:
    """What is particular to a card; `table_card` adds what all tables have."""

    what: str  # the first paragraph
    columns: Mapping[str, str]  # name -> meaning
    header: Mapping[str, Any] = field(default_factory=dict)
    reading: Sequence[str] = ()  # blocks; by default a question in SQL
    sections: Sequence[str] = ()
    public: Sequence[str] = ()  # files with an underscore that may be published


def write_card(output: Table, counts: Mapping[str, int] | None = None) -> None:
    """Write the card of a finished table, where there is none that says the same.

    `counts` are its rows by status, if they are known. A table of an earlier version, whose parts lie
    beside its `_table.json`, has no card: Arrow would take that for a part. One of captions is written
    by their job.
    """
    about = output.describe()
    kind = _KINDS.get(about["kind"])
    if kind is None or not about.get("parts") or not is_file(output.part(0)):
        return
    is_there = is_file(output.folder / FILE)
    if not is_there and output.pending():
        return
    counts = output.counts() if counts is None else counts
    text = table_card(output, counts, kind(output, counts))
    if is_there:
        file = output.folder / FILE
        is_there = read_text(file) == text
    if not is_there:
        write_atomically(output.folder / FILE, text)


def table_card(output: Table, counts: Mapping[str, int], about: Card) -> str:
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
        **about.header,
        "dataset_info": {"features": features},
        # Nothing else in the folder is data, whatever its suffix.
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
    }
    besides = " and ".join(f"`{file}`" for file in about.public)
    blocks = [
        f"# {name}",
        about.what,
        f"""```python
from datasets import load_dataset

rows = load_dataset("{path}", split="train")  # streaming=True copies nothing
```""",
        f"""```python
import pandas, polars, ray

pandas.read_parquet("{path}/data")
polars.scan_parquet("{path}/data/*.parquet")
ray.data.read_parquet("{path}/data")  # Spark: spark.read.parquet("{path}/data")
```""",
        *(about.reading or [_sql(path)]),
        "Rows lie in `data/` alone. Names with an underscore are the job's own, and `_table.json` has the "
        "paths that its input lay at: leave them out of what you publish"
        + (f", but for {besides}." if besides else "."),
        "## Rows by status",
        table(("status", "rows"), [(status, f"{n:,}") for status, n in counts.items()]),
        *about.sections,
        "## Columns",
        table(
            ("column", "type", "meaning"),
            [(f"`{f['name']}`", f["dtype"], about.columns.get(f["name"], "")) for f in features],
        ),
    ]
    return card(header, blocks)


def path_of(output: Table) -> str:
    """Where a reader of the card has the table."""
    return f"path/to/{output.folder.name}"


def _features(output: Table) -> list[dict[str, str]]:
    """The columns of the parts, and their types by the names that `datasets` has for them.

    They hold where a part has no row, or nothing but nulls.
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
    """How the table was made: the settings that decide its rows."""
    found: dict[str, Any] = {}
    for name, value in {**output.describe()["identity"], **(more or {})}.items():
        if name in _NO_SETTINGS or value in (None, [], {}):
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
        settings += [
            table(("run", "rows of the list", "dropped by the list alone", "fetched"), lines)
        ]
    return Card(
        what=f"{counts.get(OK, 0):,} images that are to be used, of {sum(counts.values()):,} URLs. Take the rows "
        "whose `status` is `ok`. The others say why there is no image, or why theirs is not to be used: of "
        "copies (`duplicate`) and of what a filter rules out (`filtered:…`) the picture is kept. The "
        "pictures are works of others: `license` and `source` are what the list says of them.",
        columns=_IMAGE_COLUMNS,
        header={"tags": ["vlv"]},
        sections=settings,
        public=["_report.html"],
    )


def _pair_card(output: Table, counts: Mapping[str, int]) -> Card:
    return Card(
        what=f"{counts.get(OK, 0):,} images, each with a caption that a captioner learns from, in stage 2 "
        f"of {_METHOD}. The pictures are works of others: `license` and `source` are what the list "
        "says of them.",
        columns=_IMAGE_COLUMNS,
        header={"task_categories": ["image-to-text"], "tags": ["vlv"]},
        sections=_settings(output),
    )


def _latent_card(output: Table, counts: Mapping[str, int]) -> Card:
    shape = output.describe()["identity"].get("latent_shape", [])
    decode = f"""```python
import numpy as np, torch

row = next(row for row in rows if row["status"] == "ok")  # of the others it is null
words = np.frombuffer(row["mean"], "<i2").copy()
mean = torch.from_numpy(words).view(torch.bfloat16).view({", ".join(map(str, shape))})
```"""
    return Card(
        what=f"What a VAE says of {counts.get(OK, 0):,} of {sum(counts.values()):,} images: the distribution "
        f"of each one's latents. Stage 1 of {_METHOD} reads it in place of the images.",
        columns=COLUMNS
        | {
            "mean": f"bfloat16, little-endian, of shape {shape} (channels, height, width)",
            "deviation": "the standard deviation, in the same way",
        },
        header={"tags": ["vlv"]},
        reading=[decode],
        sections=_settings(output),
    )


def _picture_card(output: Table, counts: Mapping[str, int]) -> Card:
    return Card(
        what=f"{counts.get(OK, 0):,} pictures that a frozen diffusion model drew from what the encoder of "
        f"{_METHOD} says of {sum(counts.values()):,} images. None is a photograph.",
        columns=COLUMNS | {"image": "the picture, a PNG file; null where the status is not ok"},
        header={"tags": ["vlv", "arxiv:2507.07104", "synthetic"]},
        sections=_settings(output),
    )


_KINDS: dict[str, Callable[[Table, Mapping[str, int]], Card]] = {
    "image": _image_card,
    "pair": _pair_card,
    "latents": _latent_card,
    "reconstruction": _picture_card,
}
