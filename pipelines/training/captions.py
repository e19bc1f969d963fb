"""Where the captions of stage 2 lie, and their texts by the value that names their image.

    source (data.captions)                             named by
    one of our tables, Parquet, CSV, TSV, JSONL, JSON  `key`, else `url`, else a column of file names
    JSON of captions by file name; COCO's annotations  the file name
    sidecars of a folder or of shards                  path without suffix (caption_sidecars)

A column of lists of texts gives several captions of an image, as rows of the same image do.

Texts are kept as they are written: line breaks, emoji, right-to-left marks, any script. But: control
characters other than tab and line break are removed, a line break is `\\n`, and what is beyond MAX_LENGTH
characters is cut. A text of white space only is blank: no caption.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.rows import has_text, require_columns
from pipelines.lists.input_files import input_bytes, input_files
from pipelines.lists.metadata import as_text, match_columns
from pipelines.lists.readers import format_of, read_parquet, read_tables
from pipelines.storage.fingerprints import content_fingerprint
from pipelines.storage.parquet import read_schema
from pipelines.storage.tables import Table, parquet_files
from pipelines.training.config import JoinOn
from vlv_model.errors import DataError

SETTING, DEFAULT_COLUMN = "data.captions", "caption"
MAX_LENGTH = 65_536  # characters of a caption: 200 times train.max_caption_tokens

NAME_COLUMNS = ("name", "file_name", "filename", "file", "path")  # by preference

Join = JoinOn | Literal["stem"]
"""What names an image: also a file name without its suffix, for sidecars."""

_BATCH_ROWS = 65_536
_CONTROL = r"[\x00-\x08\x0B-\x1F\x7F-\x{9F}]"
_TEXT_FORMATS = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class CaptionSource:
    """Captions that lie in the rows of some files, and the column that names their images."""

    path: str
    files: tuple[Path, ...]
    column: str
    join_on: JoinOn

    @classmethod
    def find(cls, path: str, column: str, join_on: JoinOn | None) -> CaptionSource:
        """The captions at `path`; DataError if there are none, or nothing to join them by."""
        find = parquet_files if Table(path).exists else input_files
        files = find(path, SETTING)
        return cls(path, tuple(files), column, join_on or _join_column(files[0])[0])

    def describe(self) -> str:
        """Number, size and digest of the files, to compare and to show."""
        fingerprints = str(sorted(content_fingerprint(self.files).items())).encode()
        digest = hashlib.blake2b(fingerprints, digest_size=8).hexdigest()
        return f"{len(self.files)} files, {input_bytes(self.files)} bytes, {digest}"

    def size(self, images: int) -> int:
        """The bytes of the files."""
        return input_bytes(self.files)

    def batches(self, counts: Counter[str]) -> Iterator[pa.Table]:
        """`value`, which names an image (int64 or text), and its `caption`; `counts` the rest.

        Raises DataError for a missing column, a column of another type and a damaged file.
        """
        for file in self.files:
            schema = _columns(file)
            named = self.join_on
            if named != "key":
                found = _join_columns(schema, file)
                named = found.get(self.join_on, self.join_on)  # type: ignore[assignment]
            where = f"{file} (data.join_on={self.join_on}, data.caption_column={self.column})"
            require_columns(schema, [named, self.column], where)
            for rows in _rows(file, [named, self.column]):
                values = joinable(rows[named], self.join_on, f"{file}: column '{named}'")
                rows = pa.table({"value": values, "caption": rows[self.column]})
                yield usable(as_texts(rows, file, self.column), counts)


class Source(Protocol):
    """Captions, and what names their images."""

    @property
    def path(self) -> str: ...

    @property
    def join_on(self) -> Join: ...

    def batches(self, counts: Counter[str]) -> Iterator[pa.Table]:
        """See CaptionSource.batches."""

    def describe(self) -> str:
        """What tells it from another source, to compare and to show."""

    def size(self, images: int) -> int:
        """Bytes of the captions of so many images, roughly."""


def usable(rows: pa.Table, counts: Counter[str]) -> pa.Table:
    """The rows with a caption, cleaned; the others, and the texts that were changed, are counted."""
    text = rows["caption"]
    has_control = pc.match_substring_regex(text, _CONTROL)
    if pc.any(has_control).as_py():
        counts["captions_cleaned"] += pc.sum(has_control).as_py()
        text = pc.replace_substring_regex(text, r"\r\n?", "\n")
        text = pc.replace_substring_regex(text, _CONTROL, "")
    is_long = pc.greater(pc.utf8_length(text), MAX_LENGTH)
    if pc.any(is_long).as_py():
        counts["captions_cut"] += pc.sum(is_long).as_py()
        text = pc.utf8_slice_codeunits(text, 0, MAX_LENGTH)
    mask = pc.and_(has_text(text), rows["value"].is_valid())
    counts["blank_captions"] += len(text) - pc.sum(mask, min_count=0).as_py()
    return pa.table({"value": rows["value"], "caption": text}).filter(mask)


def as_texts(rows: pa.Table, file: Path, column: str) -> pa.Table:
    """`rows` with a text in each `caption`; a list of texts becomes one row for each of them."""
    captions, where = rows["caption"], f"{file}: column '{column}'"
    if format_of(file) in _TEXT_FORMATS:
        captions = _listed(captions)
    kind = captions.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        column_of_lists = captions.combine_chunks()
        if isinstance(column_of_lists, pa.ChunkedArray):  # no rows
            return pa.table({"value": rows["value"], "caption": pa.nulls(0, pa.string())})
        parents = pc.list_parent_indices(column_of_lists)
        texts = pa.chunked_array([pc.list_flatten(column_of_lists)])
        return pa.table({"value": rows["value"].take(parents), "caption": as_text(texts, where)})
    return pa.table({"value": rows["value"], "caption": as_text(captions, where)})


def _listed(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists of texts, if any value of a JSON file is one: `read_tables` gives them as JSON."""
    if captions.type != pa.string() or not pc.any(pc.starts_with(captions, "[")).as_py():
        return captions

    def texts(value: str | None) -> list[str | None]:
        if value is not None and value.startswith("["):
            try:
                found: Any = json.loads(value)
            except ValueError:
                return [value]
            if isinstance(found, list) and all(isinstance(text, str) for text in found):
                return found
        return [value]

    lists = pa.array(map(texts, captions.to_pylist()), pa.list_(pa.string()))
    return pa.chunked_array([lists])


def joinable(column: pa.ChunkedArray, join_on: Join, where: str) -> pa.ChunkedArray:
    """Cast a join column to texts or int64 keys; DataError, beginning with `where`, if impossible."""
    if join_on != "key":
        return as_text(column, where)
    if not pa.types.is_integer(column.type):  # a key rounded to float is a wrong key
        raise DataError(f"{where} is {column.type}, expected the int64 keys that ingest wrote")
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        raise DataError(
            f"{where} is {column.type} and has values beyond int64: reinterpret its 64 bits as signed"
        ) from None


def _columns(file: Path) -> pa.Schema:
    """The columns of a file of captions: of a text file, those of its first rows."""
    if format_of(file) == ".parquet":
        return read_schema(file)
    return next((rows.schema for rows in read_tables(file) if rows.num_columns), pa.schema([]))


def _join_columns(schema: pa.Schema, file: Path) -> dict[JoinOn, str]:
    """The columns of a file that may name an image, by preference."""
    found: dict[JoinOn, str] = {}
    # A text file has nothing but texts. In Parquet, texts are another tool's keys.
    is_text = format_of(file) != ".parquet"
    if "key" in schema.names and (is_text or pa.types.is_integer(schema.field("key").type)):
        found["key"] = "key"
    if url := match_columns(schema, {}, str(file)).get("url"):
        found["url"] = url
    if name := next((name for name in NAME_COLUMNS if name in schema.names), None):
        found["name"] = name
    return found


def _join_column(file: Path) -> tuple[JoinOn, str]:
    schema = _columns(file)
    if found := _join_columns(schema, file):
        return next(iter(found.items()))
    raise DataError(
        f"{SETTING}: {file} has neither a column `key` of integers nor one of URLs or file names "
        f"({', '.join(NAME_COLUMNS)}) to join it by; "
        f"it has {', '.join(schema.names) or 'no columns'}"
    )


def _rows(file: Path, columns: list[str]) -> Iterator[pa.Table]:
    """Some columns of a file, in batches; `key` is int64, also from a text file."""
    if format_of(file) == ".parquet":
        yield from read_parquet(file, columns, _BATCH_ROWS)
        return
    for rows in read_tables(file):
        if not rows.num_rows:  # its columns may come later
            continue
        require_columns(rows.schema, columns, f"{SETTING}: {file}")
        rows = rows.select(columns)
        if "key" in columns:
            try:
                keys = rows["key"].cast(pa.int64())
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{file}: column 'key' has other values than the integers that ingest wrote "
                    f"({error}): data.join_on=url joins by URL"
                ) from None
            rows = rows.set_column(columns.index("key"), "key", keys)
        yield rows
