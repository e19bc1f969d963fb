"""Joins a table of captions to the images, by key or by URL, into a pair table.

    captions -> key, caption -> buckets sorted by key in _plan/      once
    images   -> row groups, one chunk each -> captions of their keys -> PAIR_ROW part

The parts of our image tables have disjoint key ranges, so a chunk reads one or two buckets of captions.
Tables in another order work too: their chunks read more buckets, one at a time.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.execution.chunks import run_chunks
from pipelines.execution.cluster import Cluster
from pipelines.execution.connection import RayConfig
from pipelines.execution.steps import Chunk, PlacedStep
from pipelines.execution.table_job import TableJob, run_table_job
from pipelines.images.blocklist import Blocklist
from pipelines.images.card import FILE as CARD_FILE
from pipelines.images.changes import changed_on_purpose, changes_of
from pipelines.images.removal import remove_rows
from pipelines.images.rows import (
    OK,
    PAIR_ROW,
    require_columns,
    url_key,
    with_image_feature,
)
from pipelines.images.urls import address_of
from pipelines.lists.input_files import input_bytes
from pipelines.lists.metadata import as_text
from pipelines.lists.readers import read_parquet
from pipelines.storage.files import as_path, remove_file
from pipelines.storage.fingerprints import content_fingerprint
from pipelines.storage.folders import names_in, remove_folder
from pipelines.storage.parquet import open_parquet, read_parquet_file, read_schema, write_parquet
from pipelines.storage.tables import (
    IMAGE_ROW_GROUP,
    PLAN,
    TABLE_FILE,
    Table,
    parquet_files,
    plan_file,
)
from pipelines.training.caption_buckets import captions_of, join_keys, joinable, sort_captions
from pipelines.training.captions import (
    JoinOn,
    caption_files,
    join_column_of,
)
from vlv_model.errors import DataError

if TYPE_CHECKING:
    from pipelines.training.config import Stage2Config

KIND = "pair"

_ROWS_PER_CHUNK = 256  # minimum; chunks are whole row groups
_BATCH_ROWS = 65_536
_CHUNKS = f"chunks{PLAN}"


def with_pairs(config: Stage2Config) -> Stage2Config:
    """Join `data.captions` and return settings whose `data.input` is the pair table.

    Without `data.captions`, the input already has captions and the settings are returned as they are.
    """
    data = config.data
    if data.captions is None:
        return config
    output = data.output or str(Path(config.run_dir) / "pairs")
    write_pairs(data.input, data.captions, output, data.caption_column, data.join_on, config.ray)
    joined = {"input": output, "captions": None, "caption_column": "caption"}
    return config.model_copy(update={"data": data.model_copy(update=joined)})


def write_pairs(
    images: str,
    captions: str,
    output: str,
    caption_column: str = "caption",
    join_on: JoinOn | None = None,
    ray: RayConfig | None = None,
) -> dict[str, int]:
    """Join an image table and a table of captions into a pair table (PAIR_ROW); returns counts.

    Images of status `ok` with a non-blank caption become pairs; of several captions of an image, the
    first is used. The counts are `pairs`, `images_without_caption`, `captions_without_image`,
    `repeated_captions` and `blank_captions`. If a takedown or an ingest has changed the sources of a
    finished table (pipelines.images.changes), rows taken down are removed from it, and nothing is added.
    Raises DataError for a missing column, a column of another type, a damaged file, and when no caption
    matches an image; RunError when `output` holds another run.
    """
    job = Pairs(images, captions, caption_column, join_on)
    counts = run_table_job(job, output, ray or RayConfig())
    description, pairs = Table(output).describe(), counts.get(OK, 0)
    if not pairs:
        raise DataError(
            f"none of the {description['captions']} captions of {captions} matches an image of "
            f"{images}: they were joined by {job.join_on} (data.join_on)"
        )
    return {
        "pairs": pairs,
        "images_without_caption": description["images"] - pairs,
        "captions_without_image": max(0, description["captions"] - pairs),
        "repeated_captions": description["repeated_captions"],
        "blank_captions": description["blank_captions"],
    }


class Pairs(TableJob):
    """The job that joins a table of images and a table of captions."""

    def __init__(
        self, images: str, captions: str, caption_column: str, join_on: JoinOn | None
    ) -> None:
        self.image_files = parquet_files(images)
        self.caption_files = caption_files(captions)
        self.sources = {"data.input": images, "data.captions": captions}
        self.caption_column = caption_column
        self.join_on: JoinOn = join_on or join_column_of(self.caption_files[0])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings and files that make the pairs; reads both ends of each file, so only once."""
        return {
            "data.input": _describe_files(self.image_files),
            "data.captions": _describe_files(self.caption_files),
            "data.caption_column": self.caption_column,
            "data.join_on": self.join_on,
        }

    def check(self, table: Table) -> None:
        if not (table.exists and self._changed_on_purpose(table)):
            table.check_same_run(KIND, self.identity)

    def plan(self, table: Table) -> None:
        if table.exists and self._changed_on_purpose(table):
            self._apply_takedowns(table)
        if table.exists:
            return
        files = self.image_files, self.caption_files
        plan = _plan(table, *files, self.caption_column, self.join_on)
        table.create(KIND, self.identity, **plan, addresses=True, changes=self._changes())

    def run(self, table: Table, cluster: Cluster) -> None:
        join = PlacedStep(partial(_join, table=table, join_on=self.join_on))
        write = partial(_write, table=table)
        images = table.describe()["images"]
        run_chunks(cluster, table.pending(), [join], write, "pairs", images, table.counts())

    def _changes(self) -> dict[str, Any]:
        return {name: changes_of(path) for name, path in self.sources.items()}

    def _differing(self, table: Table) -> list[str]:
        recorded = table.describe()["identity"]
        return [name for name, value in self.identity.items() if recorded.get(name) != value]

    def _changed_on_purpose(self, table: Table) -> bool:
        """Whether the sources differ from the recorded ones only by takedowns or ingests."""
        description, differing = table.describe(), self._differing(table)
        recorded_changes = description.get("changes", {})
        on_purpose = (
            name in self.sources
            and changed_on_purpose(self.sources[name], recorded_changes.get(name))
            for name in differing
        )
        return bool(description["kind"] == KIND and differing and all(on_purpose))

    def _apply_takedowns(self, table: Table) -> None:
        """Remove the rows that were taken down from the sources, and record the new identity.

        An unfinished table is deleted, to be planned again, since its rows have moved.
        """
        description, differing = table.describe(), self._differing(table)
        if table.pending():
            remove_folder(table.folder / "_commits")
            for name in names_in(table.parts):
                if name.startswith("part-"):
                    remove_file(table.parts / name)
            for name in (CARD_FILE, TABLE_FILE):
                remove_file(table.folder / name)
            return

        blocked = Blocklist.read(table)
        for path in self.sources.values():
            blocked |= replace(Blocklist.read(Table(path)), unmatched=frozenset())
        blocked.write(table)
        removed = remove_rows(table, blocked)
        print(
            f"{removed:,} pairs of {table.folder} were taken down; new rows of "
            f"{' and '.join(differing)} are ignored: write them to another table",
            file=sys.stderr,
        )
        fields = {k: v for k, v in description.items() if k not in ("kind", "identity", "chunks")}
        fields["changes"] = self._changes()
        table.create(KIND, self.identity, description["chunks"], **fields)


def _describe_files(files: list[Path]) -> str:
    """Number, size and digest of a table's files, to compare and to show."""
    fingerprints = str(sorted(content_fingerprint(files).items())).encode()
    digest = hashlib.blake2b(fingerprints, digest_size=8).hexdigest()
    return f"{len(files)} files, {input_bytes(files)} bytes, {digest}"


# ---------------------------------------------------------------------------------------- plan


def _plan(
    table: Table,
    image_files: list[Path],
    caption_files: list[Path],
    caption_column: str,
    join_on: JoinOn,
) -> dict[str, int]:
    """Write `_plan/`, the captions by key and the row groups of each chunk; returns counts."""
    folder = table.folder / "_plan"
    remove_folder(folder)
    folder.mkdir(parents=True)
    counts = sort_captions(folder, caption_files, caption_column, join_on)
    chunks: list[dict[str, Any]] = []
    images = 0
    for file in image_files:
        images += _usable_rows(file, join_on)
        with open_parquet(file) as parquet:
            rows = _ROWS_PER_CHUNK  # so that each file begins a chunk
            for group in range(parquet.num_row_groups):
                if rows >= _ROWS_PER_CHUNK:
                    chunks.append({"file": str(file), "groups": []})
                    rows = 0
                chunks[-1]["groups"].append(group)
                rows += parquet.metadata.row_group(group).num_rows
    write_parquet(folder / _CHUNKS, pa.Table.from_pylist(chunks))
    return {"chunks": len(chunks), "images": images, **counts}


def _usable_rows(file: Path, join_on: JoinOn) -> int:
    """The number of images of status `ok` in a file; raises DataError for unusable columns."""
    schema = read_schema(file)
    require_columns(schema, ["image", join_on], str(file))
    for field in PAIR_ROW:
        _column(schema.empty_table(), field, file)
    names = [name for name in ("status", join_on) if name in schema.names]
    total = 0
    for rows in read_parquet(file, names, _BATCH_ROWS):
        usable = _usable(rows, file)
        joinable(usable[join_on], join_on, f"{file}: column '{join_on}'")
        total += usable.num_rows
    return total


def _usable(rows: pa.Table, file: Path) -> pa.Table:
    """The rows of status `ok`; all rows if there is no status column."""
    if "status" not in rows.column_names:
        return rows
    return rows.filter(pc.equal(as_text(rows["status"], f"{file}: column 'status'"), OK))


# ---------------------------------------------------------------------------------------- join


def _write(chunk: Chunk, table: Table) -> None:
    table.write(chunk.number, chunk.rows, row_group_size=IMAGE_ROW_GROUP)


def _join(chunk: Chunk, table: Table, join_on: JoinOn) -> Chunk:
    return replace(chunk, rows=join_chunk(chunk.number, table, join_on))


def join_chunk(chunk: int, table: Table, join_on: JoinOn) -> pa.Table:
    """The PAIR_ROW rows of one chunk."""
    plan = table.folder / "_plan"
    (source,) = read_parquet_file(plan_file(plan / _CHUNKS)).slice(chunk, 1).to_pylist()
    file = as_path(source["file"])
    with open_parquet(file) as parquet:
        rows = _usable(parquet.read_row_groups(source["groups"]), file)
    where = f"{file}: column '{join_on}'"
    # Plans of earlier versions hashed URLs as spelled.
    hash_url = address_of if table.describe().get("addresses") else url_key
    keys = join_keys(rows[join_on], join_on, where, hash_url)
    captions = captions_of(keys, plan)
    has_caption = captions.is_valid()
    rows, captions = rows.filter(has_caption), captions.filter(has_caption)
    if "key" not in rows.column_names:  # not written by ingest; joined by URL
        rows = rows.append_column("key", join_keys(rows[join_on], join_on, where, url_key))
    return pa.table(
        [captions if field.name == "caption" else _column(rows, field, file) for field in PAIR_ROW],
        schema=with_image_feature(PAIR_ROW),
    )


def _column(rows: pa.Table, field: pa.Field, file: Path) -> pa.Array | pa.ChunkedArray:
    name, kind = field.name, field.type
    if name not in rows.column_names:
        return pa.array([OK if name == "status" else None] * rows.num_rows, kind)
    if pa.types.is_string(kind):
        return as_text(rows[name], f"{file}: column '{name}'")
    try:
        return rows[name].cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"{file}: column '{name}' is {rows[name].type} and cannot be read as {kind}: rename it"
        ) from None
