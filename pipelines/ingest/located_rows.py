"""Rows of a plan whose images are there: a listing's rows, their metadata, and the places of their images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.rows import DECODE, METADATA_ROW, OK, key_of, normalise_url, status
from pipelines.ingest import img2dataset
from pipelines.ingest.web.failures import clean

PLACE = pa.schema(
    [
        ("path", pa.string()),  # of the file that contains the image
        ("offset", pa.int64()),  # offset to row: as in LISTED_ROW (pipelines.images.external)
        ("size", pa.int64()),
        ("group", pa.int32()),
        ("row", pa.int64()),
        ("unit", pa.int32()),  # of images in Parquet (pipelines.ingest.unpack)
        ("lost", pa.string()),  # the status, if it is known that there is no image
        ("reason", pa.string()),  # its error
    ]
)
"""Where the image of a planned row lies."""

State = tuple[str | None, str | None]
"""The status and error of a row of which it is known that there is no image; None of any other."""

READ: State = (None, None)
_NO_IMAGE = status(DECODE, "no_image")


@dataclass
class SampleMetadata:
    """img2dataset's metadata of one shard or folder."""

    images: Path
    known: pa.Table  # of METADATA_ROW, without the key
    keys: pa.ChunkedArray  # names of the samples
    lost: list[State]

    def __post_init__(self) -> None:
        self._met = [False] * len(self.keys)

    def indices(self, stems: pa.ChunkedArray) -> pa.Array:
        """The row of the metadata for each image; null if there is none."""
        found = pc.index_in(stems, value_set=self.keys.combine_chunks()).combine_chunks()
        for index in found.to_pylist():
            if index is not None:
                self._met[index] = True
        return found

    def over(self, found: pa.Array, own: pa.Table) -> pa.Table:
        """The metadata of images by their `indices`, or else their `own`."""
        columns = {name: self.known[name].take(found) for name in self.known.column_names}
        for name in own.column_names:
            columns[name] = pc.coalesce(columns[name], own[name]) if name in columns else own[name]
        return pa.table(columns)

    def rest(self) -> pa.Table:
        """The rows of the metadata that have no image."""
        rest = [i for i, met in enumerate(self._met) if not met]
        if not rest:
            return pa.schema([*METADATA_ROW, *PLACE]).empty_table()
        lost = (_NO_IMAGE, f"not in {self.images.name}")
        states = [self.lost[i] if self.lost[i][0] else lost for i in rest]
        names = [f"{self.images.name}/{self.keys[i].as_py()}" for i in rest]
        listed = pa.table(
            {
                "key": pa.array([key_of(name) for name in names], pa.int64()),
                "name": pa.array(names, pa.string()),
                "image": pa.array(
                    [{"path": str(self.images)}] * len(rest), pa.struct([("path", pa.string())])
                ),
            }
        )
        return located_rows(listed, self.known.take(pa.array(rest, pa.int64())), states)


def located_rows(listed: pa.Table, known: pa.Table, states: list[State]) -> pa.Table:
    """Rows of METADATA_ROW and PLACE of a listing's rows and their metadata under our names."""
    urls: list[str] = listed["name"].to_pylist()
    keys = listed["key"].to_pylist()
    if "url" in known.column_names:
        for i, url in enumerate(known["url"].to_pylist()):
            if url is not None and url.strip():
                urls[i] = normalise_url(url)
                keys[i] = key_of(urls[i])
    values: dict[str, Any] = {name: known[name] for name in known.column_names}
    values |= {name: listed[name] for name in PLACE.names if name in listed.column_names}
    values |= {
        "key": pa.array(keys, pa.int64()),
        "url": pa.array(urls, pa.string()),
        "path": pc.struct_field(listed["image"].combine_chunks(), "path"),
        "lost": pa.array([state for state, _ in states], pa.string()),
        "reason": pa.array([error and clean(error) for _, error in states], pa.string()),
    }
    empty = pa.nulls(listed.num_rows)
    schema = pa.schema([*METADATA_ROW, *PLACE])
    return pa.table([values.get(f.name, empty).cast(f.type) for f in schema], schema=schema)


def states_of(raw: pa.Table) -> list[State]:
    """Status and error of img2dataset's rows; None for those with an image."""
    states = zip(raw["status"].to_pylist(), raw["error_message"].to_pylist(), strict=True)
    return [
        (lost, error) if (lost := img2dataset.status_of(state, error)) else READ
        for state, error in states
    ]


def states_of_table(table: pa.Table, raw: pa.Table) -> list[State]:
    """Status and error of the rows of an image table that have no image."""
    if "width" not in raw.column_names:
        return [READ] * table.num_rows
    errors = raw["error"].to_pylist() if "error" in raw.column_names else [None] * table.num_rows
    columns = (table["status"].to_pylist(), raw["width"].to_pylist(), errors)
    return [
        (state, error) if state != OK and width is None else READ
        for state, width, error in zip(*columns, strict=True)
    ]
