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

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.companions import LIST, WantedMetadata, is_companion
from pipelines.images.listed_rows import folders_of, listed_rows
from pipelines.images.rows import METADATA_ROW, has_text, require_columns
from pipelines.images.sources import Source, is_image
from pipelines.ingest import img2dataset
from pipelines.ingest.located_rows import (
    READ,
    SampleMetadata,
    located_rows,
    states_of,
    states_of_table,
)
from pipelines.lists.filters import RULE_COLUMNS, FilterConfig
from pipelines.lists.metadata import LEFT_OUT, InvalidValues, cast_columns, match_columns
from pipelines.lists.readers import as_texts
from pipelines.storage.files import as_path, is_file, is_url
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.parquet import open_parquet, read_parquet_file
from vlv_model.errors import DataError

UNIT_BYTES = 512 << 20
"""Row groups of one Parquet file are a unit up to this size, uncompressed."""

_TEXT = "text:"  # a name that no list has
_METADATA_SHARE = 50  # bytes of images for each byte of metadata, at least
_FOLDER_BYTES = 1 << 30  # taken for the metadata of image files, which are not measured


def present_columns(columns: Mapping[str, str | None], schema: pa.Schema) -> dict[str, str | None]:
    """Those of `data.columns` that a file has: not every file has each of them."""
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
        found = match_columns(schema, present_columns(self.columns, schema), str(file))
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
            states = [READ] * table.num_rows
            if self.source.layout == "table":
                states = states_of_table(table, raw)
            elif img2dataset.has_states(raw.schema):
                states = states_of(raw)
            yield located_rows(table, known, states)

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
        current: SampleMetadata | None = None  # of the shard or folder of the rows before
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
            yield located_rows(table, current.over(found, own), [READ] * table.num_rows)
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

    def _open(
        self, images: Path, filtered: Collection[str], invalid: InvalidValues
    ) -> SampleMetadata:
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
                    return SampleMetadata(
                        images, known, raw["key"].cast(pa.string()), states_of(raw)
                    )
        return SampleMetadata(images, pa.table({}), pa.chunked_array([[]], pa.string()), [])

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
        if "txt" in names and "alt_text" not in self.columns.values():
            self._found.add("alt_text")
            texts = raw["txt"]
            if "alt_text" in found:  # the text wins, as in trainings (data.captions)
                texts = pc.if_else(has_text(texts), texts, raw[found["alt_text"]])
            raw = raw.append_column(_TEXT, texts)
            found["alt_text"] = _TEXT
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


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace").strip().replace("\0", "")
