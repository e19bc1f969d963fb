"""Images that are there already, as the input of an ingest: nothing is asked of the network.

    listing (pipelines.images.listing) ─▶ its metadata under our names ─▶ rows of a plan, with the places
                                           of Parquet, .json and .txt        of their images

A row's key is that of its URL if it has one, as if it were downloaded, or else that of the listing. Rows
of which it is known that there is no image (img2dataset's failures) have their status in `lost`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.companions import LIST, WantedMetadata, is_companion
from pipelines.images.listing import folders_of, listed_rows
from pipelines.images.rows import (
    DECODE,
    METADATA_ROW,
    OK,
    has_text,
    key_of,
    normalise_url,
    require_columns,
    status,
)
from pipelines.images.sources import (
    PREFERRED_COLUMNS,
    Source,
    find_source,
    image_columns,
    is_image,
    survey,
)
from pipelines.ingest import img2dataset
from pipelines.ingest.web.failures import clean
from pipelines.lists.filters import RULE_COLUMNS, FilterConfig
from pipelines.lists.metadata import LEFT_OUT, InvalidValues, cast_columns, match_columns
from pipelines.lists.readers import as_texts, read_tables
from pipelines.pictures.formats import Encoding
from pipelines.storage.files import as_path, is_file, is_url
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.parquet import open_parquet, read_parquet_file, read_schema
from pipelines.storage.tables import Table
from vlv_model.errors import DataError

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

UNIT_BYTES = 512 << 20
"""Row groups of one Parquet file are a unit up to this size, uncompressed."""

_NO_IMAGE = status(DECODE, "no_image")
_METADATA_SHARE = 50  # bytes of images for each byte of metadata, at least
_FOLDER_BYTES = 1 << 30  # taken for the metadata of image files, which are not measured


def find_images(
    path: str,
    image_column: str | None,
    columns: Mapping[str, str | None],
    encoding: Encoding = "file",
) -> LocalImages | None:
    """The images at `data.input`, files or arrays of an `encoding`; None for a list of URLs.

    Parquet with both a URL and an image column holds images. Raises DataError for a mixture of images and
    lists, and as `find_source` does.
    """
    where = as_path(path)
    if not is_file(where) and Table(where).exists:
        return LocalImages(path, find_source(path, image_column, encoding=encoding), columns)
    found = survey(path, encoding)
    if found is None:
        return None
    parquets = sorted(found.parquets, key=str)
    schema = read_schema(parquets[0]) if parquets else None
    named = image_column is not None or encoding != "file"
    are_images = schema is not None and _has_images(schema, named, columns, parquets[0])
    if found.others[".tfrecord"] and not are_images:
        raise DataError(
            f"data.input={path} contains .tfrecord files, which are not read: rewrite them as .tar shards "
            "(docs/img2dataset.md has a script), or give img2dataset's Parquet files alone as a list of URLs"
        )
    if not (found.tars or found.image or are_images):
        if schema is not None and img2dataset.is_metadata(schema):
            print(
                f"data.input={path} has the metadata of img2dataset without its images: it is a list of URLs",
                file=sys.stderr,
            )
        return (
            None
            if not found.compressed
            else LocalImages(path, find_source(path, encoding=encoding), columns)
        )
    lists = [] if are_images else parquets
    metadata: tuple[Path, ...] = ()
    if lists and schema is not None and img2dataset.is_metadata(schema):
        lists, metadata = [], tuple(lists)
    for file in [*lists, *found.texts]:
        _check_is_note(file, columns, path)
    return LocalImages(path, find_source(path, image_column, encoding=encoding), columns, metadata)


def _has_images(
    schema: pa.Schema, named: bool, columns: Mapping[str, str | None], file: Path
) -> bool:
    """Whether a Parquet file holds images. Lists of URLs may have other columns of bytes.

    `named`: settings say that there are images.
    """
    candidates = image_columns(schema)
    if not candidates or named:
        return bool(candidates)
    found = match_columns(schema, _present(columns, schema), str(file))
    if "url" not in found:
        return True
    rest = [name for name in candidates if name not in found.values()]
    structs = [name for name in rest if pa.types.is_struct(schema.field(name).type)]
    return bool(structs or {*PREFERRED_COLUMNS} & {*rest})


def _check_is_note(file: Path, columns: Mapping[str, str | None], path: str) -> None:
    """Raise DataError if a file beside images is a list of URLs; a warning for any other."""
    batch = next(iter(read_tables(file)), pa.table({}))
    if "url" in match_columns(batch.schema, _present(columns, batch.schema), str(file)):
        raise DataError(
            f"data.input={path} contains images and a list of URLs ({file.name}): give one of them, such "
            f"as data.input={file}"
        )
    print(
        f"warning: {file} is not read: metadata are read from .json and .txt files beside the images and "
        "from img2dataset's Parquet",
        file=sys.stderr,
    )


def _present(columns: Mapping[str, str | None], schema: pa.Schema) -> dict[str, str | None]:
    return {name: ours for name, ours in columns.items() if name in schema.names}


@dataclass
class LocalImages:
    """Images with their metadata, as rows for a plan."""

    path: str  # data.input
    source: Source
    columns: Mapping[str, str | None]  # data.columns
    metadata: tuple[Path, ...] = ()  # img2dataset's Parquet files, where they have been found
    skipped: Counter[str] = field(default_factory=Counter)  # files in shards, by suffix
    _units: int = 0
    _seen: set[str] = field(default_factory=set)  # columns of the metadata, by their own names
    _found: set[str] = field(default_factory=set)  # and by ours
    _damaged: list[str] = field(default_factory=list)  # metadata files that cannot be read

    @property
    def num_bytes(self) -> int:
        """About the size of the metadata."""
        if self.source.layout == "folder":
            return _FOLDER_BYTES
        return sum(file.stat().st_size for file in self.source.files) // _METADATA_SHARE

    def fingerprint(self) -> dict[str, str]:
        """What identifies the input of a run: paths and sizes of files; of images in a folder, paths."""
        source = self.source
        if source.layout != "folder":
            files = [*source.files, *self.metadata]
            return {"images": source.layout, "files": self._sizes(files)}
        digest = hashlib.sha256()
        for folder, names in folders_of(source):
            for name, size in sorted(names):
                if is_companion(name) and not is_url(folder):
                    size = os.stat(folder / name).st_size
                if is_image(name, source.encoding) or is_companion(name):
                    below = str(folder)[len(str(source.root)) :]
                    line = f"{below}/{name} {size}\n"
                    digest.update(line.encode("utf-8", "surrogateescape"))
        return {
            "images": "folder",
            "files": digest.hexdigest()[:16],
            "metadata": self._sizes(self.metadata),
        }

    def _sizes(self, files: Sequence[Path]) -> str:
        below = len(str(self.source.root))
        return size_fingerprint({str(file)[below:]: file for file in files})

    def batches(self, filters: FilterConfig, invalid: InvalidValues) -> Iterator[pa.Table]:
        """METADATA_ROW and PLACE of all images and of rows that have lost theirs.

        Raises DataError if there is none, and if no image has the column of a filter.
        """
        filtered = {name for rule in filters.rules() for name in RULE_COLUMNS[rule]}
        wanted = WantedMetadata(self._wanted, lambda folder: not self._has_metadata(folder))
        tables = listed_rows(self.source, None, None, self.skipped, wanted)
        rows = 0
        join = self._of_parquet if self.source.layout in ("table", "parquet") else self._joined
        for batch in join(tables, filtered, invalid):
            rows += batch.num_rows
            if batch.num_rows:
                yield batch
        if not rows:
            skipped = "".join(
                f", {n:,} {suffix or 'without suffix'}" for suffix, n in self.skipped.items()
            )
            raise DataError(f"data.input={self.path} has no image{skipped}")
        self._check(filters)

    # ---------------------------------------------------------------------- metadata of a source

    def _wanted(self, schema: pa.Schema, file: Path) -> Collection[str]:
        """The columns to be read from a Parquet file with images."""
        found = self._match(schema, file)
        more = img2dataset.STATUS_COLUMNS if img2dataset.has_states(schema) else []
        if self.source.layout == "table":
            more = [name for name in ("error", "width") if name in schema.names]
        return {*found.values(), *more}

    def _match(self, schema: pa.Schema, file: Path) -> dict[str, str]:
        """Our columns in a file, without the sizes, which the images themselves have."""
        self._seen.update(schema.names)
        found = match_columns(schema, _present(self.columns, schema), str(file))
        found = {ours: name for ours, name in found.items() if ours in METADATA_ROW.names}
        if file.suffix == ".parquet" and self.source.column in found.values():
            found = {ours: name for ours, name in found.items() if name != self.source.column}
        self._found.update(found)
        return found

    def _of_parquet(
        self, tables: Iterator[pa.Table], filtered: Collection[str], invalid: InvalidValues
    ) -> Iterator[pa.Table]:
        of_file: Path | None = None
        units: list[int] = []
        for table in tables:
            file = as_path(table["image"][0].as_py()["path"])
            if file != of_file:
                of_file, units = file, self._units_of(file)
            table = table.append_column("unit", pa.array(units, pa.int32()).take(table["group"]))
            names = [name for name in table.column_names if name.startswith(LIST)]
            raw = table.select(names).rename_columns([name[len(LIST) :] for name in names])
            known = cast_columns(raw, self._match(raw.schema, file), filtered, file, invalid)
            states: list[tuple[str | None, str | None]] = [(None, None)] * table.num_rows
            if self.source.layout == "table":
                states = _states_of_table(table, raw)
            elif img2dataset.has_states(raw.schema):
                states = _states(raw)
            yield _rows(table, known, states)

    def _units_of(self, file: Path) -> list[int]:
        """The unit of each row group of a file, counted over all files."""
        units: list[int] = []
        filled = 0
        with open_parquet(file) as parquet:
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).total_byte_size
                if not units or filled + size > UNIT_BYTES:
                    self._units, filled = self._units + 1, 0
                units.append(self._units)
                filled += size
        return units

    def _joined(
        self, tables: Iterator[pa.Table], filtered: Collection[str], invalid: InvalidValues
    ) -> Iterator[pa.Table]:
        """The rows of shards or folders with the metadata of img2dataset or of the files beside them."""
        current: _Metadata | None = None  # of the shard or folder of the rows before
        done: set[str] = set()
        for table in tables:
            if not table.num_rows:
                continue
            images = self._images_file(table)
            if current is None or current.images != images:
                if current is not None:
                    yield current.rest()
                current = self._open(images, filtered, invalid)
                done.add(str(img2dataset.metadata_beside(images)))
            found = current.indices(table["stem"])
            own = self._of_companions(table, found.is_null(), images, filtered, invalid)
            yield _rows(table, current.over(found, own), current.states(found))
        if current is not None:
            yield current.rest()
        shards = self.source.files if self.source.layout == "tar" else ()
        suffix = ".tar" if shards else ""
        beside = [str(img2dataset.metadata_beside(shard)) for shard in shards]
        for path in dict.fromkeys([*beside, *map(str, self.metadata)]):
            if path not in done:  # of a shard or folder without any image
                images = as_path(f"{path.removesuffix('.parquet')}{suffix}")
                yield self._open(images, filtered, invalid).rest()

    def _images_file(self, table: pa.Table) -> Path:
        """The shard, or the folder, of a batch of rows."""
        path = as_path(table["image"][0].as_py()["path"])
        return path if self.source.layout == "tar" else path.parent

    def _has_metadata(self, folder: Path) -> bool:
        """Whether img2dataset's metadata lie beside a folder."""
        return str(img2dataset.metadata_beside(folder)) in {str(file) for file in self.metadata}

    def _open(self, images: Path, filtered: Collection[str], invalid: InvalidValues) -> _Metadata:
        """img2dataset's metadata of a shard or folder; without rows if there are none."""
        file = img2dataset.metadata_beside(images)
        is_there = is_file(file) if self.source.layout == "tar" else self._has_metadata(images)
        if is_there:
            try:
                raw = read_parquet_file(file)
            except DataError:  # of a job that was killed
                self._damaged.append(str(file))
            else:
                if img2dataset.is_metadata(raw.schema):
                    found = self._match(raw.schema, file)
                    known = cast_columns(raw, found, filtered, file, invalid)
                    return _Metadata(images, known, raw["key"].cast(pa.string()), _states(raw))
        return _Metadata(images, pa.table({}), pa.chunked_array([[]], pa.string()), [])

    def _of_companions(
        self,
        table: pa.Table,
        needed: pa.Array,
        images: Path,
        filtered: Collection[str],
        invalid: InvalidValues,
    ) -> pa.Table:
        """The metadata of .json and .txt files beside the images, for the rows that need them."""
        rows: list[dict[str, str | None]] = []
        columns = (needed, table["json"], table["text"], table["stem"])
        for is_needed, content, text, stem in zip(*(c.to_pylist() for c in columns), strict=True):
            values = self._json(content, f"{images}: {stem}.json") if is_needed else {}
            if is_needed and text is not None:
                values.setdefault("txt", _text(text))
            rows.append(values)
        names = dict.fromkeys(chain.from_iterable(rows))
        raw = pa.table(
            {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
        )
        if not names:
            return raw
        found = self._match(raw.schema, images)
        if "txt" in names:
            self._found.add("alt_text")
            texts = (
                raw[found["alt_text"]] if "alt_text" in found else pa.nulls(len(rows), pa.string())
            )
            position = raw.schema.get_field_index(found.setdefault("alt_text", "txt"))
            filled = pc.if_else(has_text(texts), texts, raw["txt"])
            raw = raw.set_column(position, found["alt_text"], filled)
        return cast_columns(raw, found, filtered, images, invalid)

    def _json(self, content: bytes | None, where: str) -> dict[str, str | None]:
        if content is None:
            return {}
        try:
            return as_texts(json.loads(content), where)
        except (ValueError, RecursionError, DataError):
            self._damaged.append(where)
            return {}

    def _check(self, filters: FilterConfig) -> None:
        """Say which metadata were not read; DataError for a column that no file has."""
        if self._damaged:
            print(
                f"warning: {len(self._damaged):,} metadata files cannot be read (the first: "
                f"{self._damaged[0]}): their images have no metadata from them",
                file=sys.stderr,
            )
        if self.skipped:
            names = ", ".join(
                f"{n:,} {suffix or 'without suffix'}" for suffix, n in self.skipped.items()
            )
            print(
                f"warning: data.input={self.path}: {self.skipped.total():,} files in its shards were "
                f"skipped, because their names are not those of images: {names}",
                file=sys.stderr,
            )
        fields = pa.schema([(name, pa.null()) for name in sorted(self._seen)])
        where = f"data.input={self.path} (metadata of its images)"
        require_columns(
            fields, [n for n, ours in self.columns.items() if ours not in LEFT_OUT], where
        )
        for rule in by_metadata(filters).rules():
            missing = [name for name in RULE_COLUMNS[rule] if name not in self._found]
            if missing and rule not in filters.optional:
                require_columns(
                    fields, missing, f"{where}: filter '{rule}' (not in filter.optional)"
                )


def by_metadata(filters: FilterConfig) -> FilterConfig:
    """The rules without those on the size, which the images themselves have."""
    sizes = ("min_short_side", "min_aspect_ratio", "max_aspect_ratio")
    return filters.model_copy(update=dict.fromkeys(sizes))


@dataclass
class _Metadata:
    """img2dataset's metadata of one shard or folder."""

    images: Path
    known: pa.Table  # of METADATA_ROW, without the key
    keys: pa.ChunkedArray  # names of the samples
    lost: list[tuple[str | None, str | None]]  # status and error of each, None if it has an image

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

    def states(self, found: pa.Array) -> list[tuple[str | None, str | None]]:
        """An image that is there is read, whatever its status."""
        return [(None, None)] * len(found)

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
        return _rows(listed, self.known.take(pa.array(rest, pa.int64())), states)


def _rows(
    listed: pa.Table, known: pa.Table, states: list[tuple[str | None, str | None]]
) -> pa.Table:
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


def _states(raw: pa.Table) -> list[tuple[str | None, str | None]]:
    """Status and error of img2dataset's rows; None for those with an image."""
    states = zip(raw["status"].to_pylist(), raw["error_message"].to_pylist(), strict=True)
    return [
        (lost, error) if (lost := img2dataset.status_of(state, error)) else (None, None)
        for state, error in states
    ]


def _states_of_table(table: pa.Table, raw: pa.Table) -> list[tuple[str | None, str | None]]:
    """Status and error of the rows of an image table that have no image."""
    if "width" not in raw.column_names:
        return [(None, None)] * table.num_rows
    errors = raw["error"].to_pylist() if "error" in raw.column_names else [None] * table.num_rows
    columns = (table["status"].to_pylist(), raw["width"].to_pylist(), errors)
    return [
        (state, error) if state != OK and width is None else (None, None)
        for state, width, error in zip(*columns, strict=True)
    ]


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace").strip().replace("\0", "")
