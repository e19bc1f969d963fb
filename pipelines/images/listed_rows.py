"""The rows of a listing: one for each image of a source in a foreign format (pipelines.images.external).

    layout     input                                 key                                 name
    parquet    an image column: bytes, or a struct   `key`, `data.key_column`, or        the struct's path, a file
               of bytes and path                     hash of the file's path and row     name or URL column, or both
    tar        shards of WebDataset or img2dataset   hash of the name                    shard's path/member
    folder     image files, at any depth             hash of the name                    path in the folder

With `data.key_column=__key__` the key is the hash of the file's name alone, without folders and suffix,
in every layout: the same images have the same keys, and so the same place in a training. Paths are
relative to `data.input`, so keys do not change when it is moved, and no two images share a key.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.images.companions import (
    LIST,
    METADATA,
    WantedMetadata,
    attach,
    is_companion,
    read_companions,
)
from pipelines.images.conditions import Where, small_columns
from pipelines.images.external import (
    DAMAGED,
    INVALID_NAME,
    LISTED_ROW,
    as_utf8,
    listed_row,
)
from pipelines.images.rows import OK, check_status, key_of, require_columns, url_key
from pipelines.images.scores import Scores
from pipelines.images.shards import list_shard
from pipelines.images.sources import (
    SAMPLE_KEY,
    Source,
    image_column_of,
    image_columns,
    is_image,
    is_integer,
    sample_key,
    walk,
)
from pipelines.storage.files import is_file, is_url
from pipelines.storage.folders import names_in
from pipelines.storage.parquet import open_parquet, read_schema
from vlv_model.errors import DataError

_NAME_COLUMNS = ("file_name", "filename", "url", "URL")  # columns that name an image, by preference
_BATCH = 16_384  # image files listed at a time
_THREADS = 8  # shards listed concurrently


@dataclass(frozen=True)
class Condition:
    """`where`, over the columns of the input and the scores of `data.features`."""

    where: Where
    scores: Scores | None

    @classmethod
    def of(cls, where: str | None, scores: Scores | None) -> Condition | None:
        return None if where is None else cls(Where(where), scores)

    def select(self, listed: pa.Table, columns: pa.Table) -> pa.Table:
        """The rows of a listing that satisfy the condition on `columns`, which are in the same order."""
        if self.scores is not None:
            columns = self.scores.join(columns, listed["key"].to_numpy())
        return listed.filter(pa.array(self.where.mask(columns)))


def listed_rows(
    source: Source,
    key_column: str | None,
    where: Condition | None,
    others: Counter[str],
    metadata: WantedMetadata | None = None,
    texts: Sequence[str] = (),
) -> Iterator[pa.Table]:
    """The LISTED_ROW rows of a source, file by file; `others` counts skipped files in shards.

    With `metadata` rows also have it: of Parquet the wanted columns, each named LIST and its name; of other
    sources the columns METADATA.
    """
    if source.layout in ("table", "parquet"):
        for file in source.files:
            yield from _parquet_rows(source, file, key_column, where, metadata, texts)
        return
    with_metadata = metadata is not None
    if source.layout == "tar":
        with ThreadPoolExecutor(_THREADS) as readers:

            def list_one(shard: Path) -> tuple[pa.Table, Counter[str]]:
                counted: Counter[str] = Counter()  # per thread
                name = relative_name(shard, source.root)
                rows = list_shard(shard, name, counted, source.encoding, with_metadata)
                if key_column == SAMPLE_KEY:
                    for row in rows:
                        if row["size"] != DAMAGED:  # of a shard's rest only the place is known
                            row["key"] = key_of(sample_key(row["name"]))
                return _as_table(rows, with_metadata), counted

            for first in range(0, len(source.files), _THREADS):
                shards = readers.map(list_one, source.files[first : first + _THREADS])
                for table, counted in shards:
                    others.update(counted)
                    yield _select(table, where)
        return
    if metadata is not None:
        yield from _files_with_metadata(source, metadata)
        return
    files = _image_files(source)
    if key_column == SAMPLE_KEY:
        files = (row | {"key": key_of(sample_key(row["name"]))} for row in files)
    while batch := list(islice(files, _BATCH)):
        yield _select(_as_table(batch), where)


def _files_with_metadata(source: Source, metadata: WantedMetadata) -> Iterator[pa.Table]:
    """The rows of image files with the columns METADATA, one folder after another."""
    for parent, names in folders_of(source):
        images = [(name, size) for name, size in names if is_image(name, source.encoding)]
        beside = {name for name, _ in names if is_companion(name)}
        beside = beside if images and metadata.companions(parent) else set()
        by_stem: dict[str, list[str]] = {}
        for name in beside:
            by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
        for first in range(0, len(images), _BATCH):
            batch = images[first : first + _BATCH]
            rows = [_file_row(parent, name, size, source.root) for name, size in batch]
            stems = [os.path.splitext(name)[0] for name, _ in batch]
            wanted = [parent / name for stem in stems for name in by_stem.pop(stem, ())]
            contents = {Path(p).name: data for p, data in read_companions(wanted).items()}
            yield _as_table(attach(rows, stems, contents), with_metadata=True)


def folders_of(source: Source) -> Iterator[tuple[Path, list[tuple[str, int | None]]]]:
    """Each folder of a source of image files, with the names in it."""
    if is_file(source.root):
        folders: Iterable[Path] = [source.root.parent]
        chosen = {source.root}
    elif source.files:
        folders, chosen = dict.fromkeys(file.parent for file in source.files), set(source.files)
    else:
        yield from walk(source.root)
        return
    for folder in folders:
        names = names_in(folder)
        kept = (n for n in names if not is_image(n, source.encoding) or folder / n in chosen)
        yield folder, [(name, None) for name in kept]


def _select(table: pa.Table, where: Condition | None) -> pa.Table:
    if where is None:
        return table
    return where.select(table, table.select(["key", "name", "size"]))


def _parquet_rows(
    source: Source,
    file: Path,
    key_column: str | None,
    where: Condition | None,
    metadata: WantedMetadata | None = None,
    texts: Sequence[str] = (),
) -> Iterator[pa.Table]:
    schema, path, relative = read_schema(file), str(file), relative_name(file, source.root)
    column = source.column or "image"
    if column not in image_columns(schema):
        image_column_of(schema, column, path)
    by_name = key_column == SAMPLE_KEY
    if key_column not in (None, SAMPLE_KEY, *schema.names):
        raise DataError(f"data.key_column={key_column}: {file} has {', '.join(schema.names)}")
    key = key_column or ("key" if is_integer(schema, "key") else None)
    if by_name:  # img2dataset has `key`; else the file's name
        texts_of_keys = (n for n in (SAMPLE_KEY, "key") if n in schema.names)
        key = next((name for name in texts_of_keys if not is_integer(schema, name)), None)
    if source.layout == "table":
        check_status(schema, path)
    status = "status" if source.layout == "table" and "status" in schema.names else None
    title = next((name for name in _NAME_COLUMNS if name in schema.names), None)
    is_struct = pa.types.is_struct(schema.field(column).type)
    has_path = is_struct and any(field.name == "path" for field in schema.field(column).type)
    require_columns(schema, list(texts), path)
    wanted = {name for name in (key, status, title, *texts) if name}
    wanted |= set(small_columns(schema)) if where is not None else set()
    beside = sorted(metadata.columns(schema, file)) if metadata is not None else []
    columns = [*sorted(wanted | {*beside}), *([f"{column}.path"] if has_path else ())]
    first = 0
    with open_parquet(file) as parquet:
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if not count:  # of an empty frame, as pandas writes it
                continue
            rows = parquet.read_row_group(group, columns=columns) if columns else None
            values = {name: rows[name].to_pylist() for name in wanted} if rows is not None else {}
            paths = rows[column].to_pylist() if rows is not None and has_path else []
            addresses = [f"{relative}#{first + row}" for row in range(count)]
            first += count
            names = (values[title] if title else None) or [None] * count
            if has_path:
                inner = [value and value["path"] for value in paths]
                names = [a or b for a, b in zip(inner, names, strict=True)]
            if by_name:
                keys = _sample_keys(values[key] if key else names, path)
            else:
                keys = (
                    row_keys(values[key], key, addresses) if key else [key_of(a) for a in addresses]
                )
            table = pa.table(
                {
                    "key": keys,
                    "name": [str(n) if n else a for n, a in zip(names, addresses, strict=True)],
                    "image": [{"bytes": None, "path": path}] * count,
                    "offset": pa.nulls(count, pa.int64()),
                    "size": pa.nulls(count, pa.int64()),
                    "group": [group] * count,
                    "row": range(count),
                    "status": values[status] if status else [OK] * count,
                    **{name: values[name] for name in texts},
                },
                pa.schema([*LISTED_ROW, *(schema.field(name) for name in texts)]),
            )
            if where is not None and rows is not None:
                table = where.select(table, rows.select(sorted(wanted)))
            if rows is not None:
                for name in beside:
                    table = table.append_column(f"{LIST}{name}", rows[name])
            yield table


def _sample_keys(names: Sequence[str | None], path: str) -> list[int]:
    """The keys of rows by the names of their files."""
    if None in names:
        raise DataError(
            f"data.key_column={SAMPLE_KEY}: {path} has a row without the name of its file, and no column "
            f"{SAMPLE_KEY} or key"
        )
    return [key_of(sample_key(str(name))) for name in names]


def row_keys(values: Sequence[Any], column: str, addresses: Sequence[str] = ()) -> list[int]:
    """The keys of rows by a column: integers as they are, texts hashed, `url` as ingest hashes it.

    A row without a value is identified by its address, the file and the row; DataError if there are no
    `addresses`.
    """
    if not addresses and None in values:
        raise DataError(f"column {column!r} has rows without a value, which cannot be identified")
    return [
        key_of(addresses[i]) if value is None else _key(value, column)
        for i, value in enumerate(values)
    ]


def _key(value: Any, column: str) -> int:
    if isinstance(value, int):
        return int(np.int64(np.uint64(value % 2**64)))  # a uint64 keeps its bits
    return url_key(value) if column in ("url", "URL") else key_of(str(value))


def _image_files(source: Source) -> Iterator[dict[str, Any]]:
    root = source.root
    if source.files:
        yield from (_file_row(root, relative_name(file, root), None, root) for file in source.files)
    elif is_file(root):
        yield listed_row(root.name, str(root), None, None)
    else:
        for parent, names in walk(root):
            for name, size in names:
                if is_image(name, source.encoding):
                    yield _file_row(parent, name, size, root)


def _file_row(parent: Path, name: str, size: int | None, root: Path) -> dict[str, Any]:
    folder = relative_name(parent, root)
    relative = f"{folder}/{name}" if folder else name
    text = as_utf8(relative)
    if text != relative:  # Arrow strings are UTF-8, so the listing cannot store the path
        size = INVALID_NAME
    return listed_row(text, as_utf8(str(parent / name)), None, size, key_of(relative))


def _as_table(rows: list[dict[str, Any]], with_metadata: bool = False) -> pa.Table:
    schema = pa.schema([*LISTED_ROW, *METADATA]) if with_metadata else LISTED_ROW
    return pa.Table.from_pylist(rows, schema)


def relative_name(path: Path, root: Path) -> str:
    """The path below `root`, with slashes; empty for the root itself."""
    if is_url(path):  # `parts` would skip folders with an empty name
        return str(path)[len(str(root).rstrip("/")) + 1 :]
    return "/".join(path.parts[len(root.parts) :])
