"""Lists images in foreign formats once, as a table of our layout (pipelines.images.external).

    layout     input                                 key                                 name
    parquet    an image column: bytes, or a struct   `key`, `data.key_column`, or        the struct's path, a file
               of bytes and path                     hash of the file's path and row     name or URL column, or both
    tar        shards of WebDataset or img2dataset   hash of the name                    shard's path/member
    folder     image files, at any depth             hash of the name                    path in the folder

With `data.key_column=__key__` the key is the hash of the file's name alone, without folders and suffix,
in every layout: the same images have the same keys, and so the same place in a training. Paths are relative to `data.input`, so keys do not change when it is moved, and no two images share a
key. The listing is written file by file and contains no image bytes.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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
    COLUMN,
    DAMAGED,
    INVALID_NAME,
    LISTED_ROW,
    as_utf8,
    listed_row,
)
from pipelines.images.rows import OK, check_status, key_of, require_columns, url_key
from pipelines.images.scores import Scores, scores_fingerprint
from pipelines.images.shards import list_shard
from pipelines.images.sources import (
    SAMPLE_KEY,
    Source,
    find_source,
    image_column_of,
    image_columns,
    is_image,
    is_integer,
    sample_key,
    walk,
)
from pipelines.pictures.formats import Encoding
from pipelines.storage.files import is_file, is_url, write_atomically
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.folders import files_below, names_in, remove_folder
from pipelines.storage.parquet import open_parquet, read_schema, write_parquet
from pipelines.storage.tables import PLAN, Table, read_json_object
from vlv_model.errors import DataError

FOLDER, DESCRIPTION = "_plan/listing", "_plan/listing.json"
_NAME_COLUMNS = ("file_name", "filename", "url", "URL")  # columns that name an image, by preference
_FILE_ROWS = 1 << 18  # rows per file of the listing
_ROW_GROUP = 1024
_BATCH = 16_384  # image files listed at a time
_THREADS = 8  # shards listed concurrently


def list_images(
    output: Path,
    path: str,
    image_column: str | None = None,
    key_column: str | None = None,
    where: str | None = None,
    setting: str = "data.input",
    again: bool = False,
    encoding: Encoding = "file",
    features: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> tuple[list[Path], dict[str, Any]]:
    """The Parquet files of a table with the images at `path`, and the settings that identify it.

    A table of this pipeline is returned as it is, unless `where` selects rows of it. Anything else is
    listed in `output`, once: a continued job uses the existing listing, unless `again` asks to list the
    same images again. `features` are tables whose scores `where` can use (pipelines.images.scores);
    `texts` are columns of Parquet that the listing has, too. The caller must hold the lock on `output`.
    Raises DataError if there are no images, and ConfigError for an invalid condition.
    """
    request: dict[str, Any] = {
        "input": path,
        "image": image_column,
        "key": key_column,
        "where": where,
    }
    if encoding != "file":  # earlier versions recorded none
        request["encoding"] = encoding
    if features:
        request["features"] = list(features)
    if texts:
        request["texts"] = list(texts)
    description = output / DESCRIPTION
    recorded = read_json_object(description) if is_file(description) else None
    same_request = recorded is not None and recorded["asked"] == request
    if recorded is not None and same_request and recorded["layout"] == "folder":
        # Checking whether millions of files have changed costs as much as listing them.
        return _listing_files(output), {"layout": "folder"}
    source = find_source(path, image_column, key_column, setting, encoding)
    if source.layout == "table" and where is None:
        return list(source.files), {}
    identity = {"layout": source.layout, "files": _files_fingerprint(source)}
    identity |= {"scores": scores_fingerprint(features)} if features else {}
    if (
        recorded is None
        or not same_request
        or any(recorded.get(k) != v for k, v in identity.items())
    ):
        if Table(output).exists and not (again and same_request):
            return _listing_files(output), identity  # the caller compares the identity and refuses
        # Until the new listing is complete, it answers no request.
        unfinished = {"asked": request, "layout": "unfinished", "files": "unfinished"}
        if not is_url(output):
            description.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(description, json.dumps(unfinished))
        others: Counter[str] = Counter()
        with Scores(features) if features else nullcontext() as scores:
            condition = _Condition.of(where, scores)
            written = _write_listing(output, source, key_column, condition, others, texts)
        if not written:
            what = f"no row for which {where}" if where is not None else "no image"
            skipped = f" (and {_suffixes(others)})" if others else ""
            raise DataError(f"{setting}={path} has {what}{skipped}")
        if others:
            print(
                f"warning: {setting}={path}: {others.total():,} files in its shards were skipped, because "
                f"their names are not those of images: {_suffixes(others)}",
                file=sys.stderr,
            )
        write_atomically(description, json.dumps({"asked": request, **identity}))
    return _listing_files(output), identity if source.layout != "folder" else {"layout": "folder"}


def _suffixes(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in counts.most_common(5))


def _listing_files(output: Path) -> list[Path]:
    # Earlier versions wrote `.parquet`.
    return [file for file in files_below(output / FOLDER) if file.suffix in (PLAN, ".parquet")]


def _files_fingerprint(source: Source) -> str | None:
    """The fingerprint of Parquet files or shards; None for image files, which may be millions."""
    if source.layout == "folder":
        return None
    if not source.files:
        return None
    return size_fingerprint({_relative(file, source.root): file for file in source.files})


@dataclass(frozen=True)
class _Condition:
    """`where`, over the columns of the input and the scores of `data.features`."""

    where: Where
    scores: Scores | None

    @classmethod
    def of(cls, where: str | None, scores: Scores | None) -> _Condition | None:
        return None if where is None else cls(Where(where), scores)

    def select(self, listed: pa.Table, columns: pa.Table) -> pa.Table:
        """The rows of a listing that satisfy the condition on `columns`, which are in the same order."""
        if self.scores is not None:
            columns = self.scores.join(columns, listed["key"].to_numpy())
        return listed.filter(pa.array(self.where.mask(columns)))


def _write_listing(
    output: Path,
    source: Source,
    key_column: str | None,
    condition: _Condition | None,
    others: Counter[str],
    texts: Sequence[str],
) -> int:
    """Replace the listing; returns its number of rows. `others` counts skipped files in shards."""
    remove_folder(output / FOLDER)
    if not is_url(output):
        (output / FOLDER).mkdir(parents=True)
    schema = LISTED_ROW
    if source.layout in ("table", "parquet"):
        columns = read_schema(source.files[0])
        require_columns(columns, list(texts), str(source.files[0]))
        schema = pa.schema([*LISTED_ROW, *(columns.field(name) for name in texts)])
        schema = schema.with_metadata({COLUMN: (source.column or "").encode()})
    buffer: list[pa.Table] = []
    written, rows = 0, 0

    def flush() -> None:
        nonlocal written
        file = output / FOLDER / f"{written:06d}{PLAN}"
        write_parquet(file, pa.concat_tables(buffer), row_group_size=_ROW_GROUP)
        buffer.clear()
        written += 1

    for table in listed_rows(source, key_column, condition, others, texts=texts):
        buffer.append(table.cast(schema))
        rows += table.num_rows
        if sum(t.num_rows for t in buffer) >= _FILE_ROWS:
            flush()
    if buffer:
        flush()
    return rows


def listed_rows(
    source: Source,
    key_column: str | None,
    where: _Condition | None,
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
                name = _relative(shard, source.root)
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


def _select(table: pa.Table, where: _Condition | None) -> pa.Table:
    if where is None:
        return table
    return where.select(table, table.select(["key", "name", "size"]))


def _parquet_rows(
    source: Source,
    file: Path,
    key_column: str | None,
    where: _Condition | None,
    metadata: WantedMetadata | None = None,
    texts: Sequence[str] = (),
) -> Iterator[pa.Table]:
    schema, path, relative = read_schema(file), str(file), _relative(file, source.root)
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
        yield from (_file_row(root, _relative(file, root), None, root) for file in source.files)
    elif is_file(root):
        yield listed_row(root.name, str(root), None, None)
    else:
        for parent, names in walk(root):
            for name, size in names:
                if is_image(name, source.encoding):
                    yield _file_row(parent, name, size, root)


def _file_row(parent: Path, name: str, size: int | None, root: Path) -> dict[str, Any]:
    folder = _relative(parent, root)
    relative = f"{folder}/{name}" if folder else name
    text = as_utf8(relative)
    if text != relative:  # Arrow strings are UTF-8, so the listing cannot store the path
        size = INVALID_NAME
    return listed_row(text, as_utf8(str(parent / name)), None, size, key_of(relative))


def _as_table(rows: list[dict[str, Any]], with_metadata: bool = False) -> pa.Table:
    schema = pa.schema([*LISTED_ROW, *METADATA]) if with_metadata else LISTED_ROW
    return pa.Table.from_pylist(rows, schema)


def _relative(path: Path, root: Path) -> str:
    """The path below `root`, with slashes; empty for the root itself."""
    if is_url(path):  # `parts` would skip folders with an empty name
        return str(path)[len(str(root).rstrip("/")) + 1 :]
    return "/".join(path.parts[len(root.parts) :])
