"""Metadata files beside an image: `000123.json` and `000123.txt` of `000123.jpg`, as img2dataset,
WebDataset and trainers' folders have them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.images.external import as_utf8
from pipelines.storage.files import read_bytes

JSON, TEXTS = ".json", (".txt", ".caption", ".text")
MAX_BYTES = 1 << 20  # of one file; the rest of a longer one is not read

METADATA = pa.schema(
    [
        ("stem", pa.string()),  # of the image's file name
        ("json", pa.binary()),  # content of the files beside it; null if there are none
        ("text", pa.binary()),
    ]
)
"""Columns that a listing with metadata adds to a row. A damaged rest of a shard has no `stem`."""

LIST = "list:"
"""Begins the name of each column that a listing takes from a Parquet file."""

_THREADS = 16


@dataclass(frozen=True)
class WantedMetadata:
    """The metadata that a listing reads beside the images."""

    columns: Callable[[pa.Schema, Path], Collection[str]]
    """The columns to be read from a Parquet file with images."""
    companions: Callable[[Path], bool]
    """Whether the files beside the images of a folder are read."""


def is_companion(name: str) -> bool:
    """Whether the suffix is that of a file with an image's metadata."""
    return posixpath.splitext(name)[1].lower() in (JSON, *TEXTS)


def attach(
    rows: list[dict[str, Any]], stems: Sequence[str], companions: Mapping[str, bytes]
) -> list[dict[str, Any]]:
    """The rows with the columns METADATA; `stems` are their names without suffix, in order.

    Rows beyond `stems` are no images. `companions` are contents by name.
    """
    by_stem: dict[str, dict[str, bytes]] = {}
    for name, content in companions.items():
        stem, suffix = posixpath.splitext(name)
        by_stem.setdefault(stem, {}).setdefault(suffix.lower(), content)
    for row, stem in zip(rows, stems, strict=False):
        # Of two images with one stem only the first has the metadata: they name one URL.
        found = by_stem.pop(stem, {})
        text = next((found[suffix] for suffix in TEXTS if suffix in found), None)
        row |= {"stem": as_utf8(posixpath.basename(stem)), "json": found.get(JSON), "text": text}
    for row in rows[len(stems) :]:
        row |= dict.fromkeys(METADATA.names)
    return rows


def read_companions(files: Iterable[Path]) -> dict[str, bytes]:
    """The beginnings of files, by path; those that cannot be read are left out."""

    def content(file: Path) -> tuple[str, bytes | None]:
        try:
            return str(file), read_bytes(file, most=MAX_BYTES)
        except OSError:
            return str(file), None

    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(content, files)
        return {path: data for path, data in found if data is not None}
