"""Images as others keep them, listed once as a table of our layout (pipelines.images.external).

    layout     what is there                         key: the hash of                    name
    parquet    an image column, bytes or a struct    `key`, `data.key_column`, or        the struct's path, a file
               of bytes and path                     the file's path and the row         name or URL, or both
    tar        WebDataset shards, img2dataset's      shard's path/member                 the same
    folder     image files, in folders too           path in the folder                  the same

Paths are those below `data.input`, so keys stay when it is moved, and no two images share one. A
listing is written while the input is read, file by file, and holds what a plan needs: no bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.images.conditions import Where, small_columns
from pipelines.images.external import COLUMN, LISTED_ROW, UNNAMED, as_utf8, listed_row
from pipelines.images.rows import OK, check_status, key_of, url_key
from pipelines.images.shards import members
from pipelines.images.sources import (
    Source,
    find_source,
    image_column_of,
    image_columns,
    is_image,
    is_integer,
    walk,
)
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.folders import files_below, remove_folder
from pipelines.storage.parquet import open_parquet, read_schema, write_parquet
from pipelines.storage.protocols import is_url
from pipelines.storage.tables import PLAN, Table, read_json_object
from vlv_model.errors import DataError

FOLDER, MADE_OF = "_plan/listing", "_plan/listing.json"
_NAMES = ("file_name", "filename", "url", "URL")  # columns that name an image, the likeliest first
_ROWS = 1 << 18  # of a file of the listing
_ROW_GROUP = 1024
_SHARDS = 8  # that are listed at a time


def list_images(
    output: Path,
    path: str,
    image_column: str | None = None,
    key_column: str | None = None,
    where: str | None = None,
    setting: str = "data.input",
    again: bool = False,
) -> tuple[list[Path], dict[str, Any]]:
    """The files of a table of our layout with the images at `path`, and what they are known by.

    A table of ours is such a table, unless only rows of it are wanted; of anything else a listing
    is written into `output`, once: a job that is continued goes on with the one that is there, unless
    the same images are to be listed `again`.
    Whoever calls holds `output`. Raises DataError where there are no images, ConfigError for a condition
    that cannot be read.
    """
    asked = {"input": path, "image": image_column, "key": key_column, "where": where}
    made_of = output / MADE_OF
    there = read_json_object(made_of) if is_file(made_of) else None
    if there is not None and there["asked"] == asked and there["layout"] == "folder":
        # To look whether millions of files are still the same costs as much as listing them.
        return _listed(output), {"layout": "folder"}
    source = find_source(path, image_column, key_column, setting)
    if source.layout == "table" and where is None:
        return list(source.files), {}
    about = {"layout": source.layout, "files": _digest(source)}
    if there is None or there["asked"] != asked or there["files"] != about["files"]:
        relist = again and there is not None and there["asked"] == asked
        if Table(output).exists and not relist:
            return _listed(output), about  # refused by whoever compares what they are of
        others: Counter[str] = Counter()
        if not _write(output, source, key_column, where, others):
            what = f"no row for which {where}" if where is not None else "no image"
            beside = f" (and {_suffixes(others)})" if others else ""
            raise DataError(f"{setting}={path} has {what}{beside}")
        if others:
            print(
                f"warning: {setting}={path}: {others.total():,} files in its shards are no images by "
                f"their names and were passed over: {_suffixes(others)}",
                file=sys.stderr,
            )
        write_atomically(made_of, json.dumps({"asked": asked, **about}))
    return _listed(output), about if source.layout != "folder" else {"layout": "folder"}


def _suffixes(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in counts.most_common(5))


def _listed(output: Path) -> list[Path]:
    # Earlier versions wrote `.parquet`.
    return [file for file in files_below(output / FOLDER) if file.suffix in (PLAN, ".parquet")]


def _digest(source: Source) -> str | None:
    if source.layout == "folder":
        return None
    digest = hashlib.sha256()
    for file in source.files:
        digest.update(f"{_below(file, source.root)} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16] if source.files else None


def _write(
    output: Path, source: Source, key_column: str | None, where: str | None, others: Counter[str]
) -> int:
    """Write a listing anew; how many rows it has. `others` counts what is no image in shards."""
    remove_folder(output / FOLDER)
    if not is_url(output):
        (output / FOLDER).mkdir(parents=True)
    schema = LISTED_ROW
    if source.layout in ("table", "parquet"):
        schema = LISTED_ROW.with_metadata({COLUMN: (source.column or "").encode()})
    condition = Where(where) if where is not None else None
    waiting: list[pa.Table] = []
    written, rows = 0, 0

    def flush() -> None:
        nonlocal written
        file = output / FOLDER / f"{written:06d}{PLAN}"
        write_parquet(file, pa.concat_tables(waiting).cast(schema), row_group_size=_ROW_GROUP)
        waiting.clear()
        written += 1

    for table in _rows(source, key_column, condition, others):
        waiting.append(table)
        rows += table.num_rows
        if sum(t.num_rows for t in waiting) >= _ROWS:
            flush()
    if waiting:
        flush()
    return rows


def _rows(
    source: Source, key_column: str | None, where: Where | None, others: Counter[str]
) -> Iterator[pa.Table]:
    if source.layout in ("table", "parquet"):
        for file in source.files:
            yield from _parquet_rows(source, file, key_column, where)
        return
    if source.layout == "tar":
        with ThreadPoolExecutor(_SHARDS) as readers:

            def listed(shard: Path) -> tuple[pa.Table, Counter[str]]:
                counted: Counter[str] = Counter()  # of one thread
                return _table(members(shard, _below(shard, source.root), counted)), counted

            for first in range(0, len(source.files), _SHARDS):
                shards = readers.map(listed, source.files[first : first + _SHARDS])
                for table, counted in shards:
                    others.update(counted)
                    yield _kept(table, where)
        return
    files = _image_files(source)
    while batch := list(islice(files, 16_384)):
        yield _kept(_table(batch), where)


def _kept(table: pa.Table, where: Where | None) -> pa.Table:
    if where is None:
        return table
    mask = where.mask(table.select(["key", "name", "size"]))
    return table.filter(pa.array(mask))


def _parquet_rows(
    source: Source, file: Path, key_column: str | None, where: Where | None
) -> Iterator[pa.Table]:
    schema, path, below = read_schema(file), str(file), _below(file, source.root)
    column = source.column or "image"
    if column not in image_columns(schema):
        image_column_of(schema, column, path)
    if key_column is not None and key_column not in schema.names:
        raise DataError(f"data.key_column={key_column}: {file} has {', '.join(schema.names)}")
    key = key_column or ("key" if is_integer(schema, "key") else None)
    if source.layout == "table":
        check_status(schema, path)
    status = "status" if source.layout == "table" and "status" in schema.names else None
    title = next((name for name in _NAMES if name in schema.names), None)
    is_struct = pa.types.is_struct(schema.field(column).type)
    has_path = is_struct and any(field.name == "path" for field in schema.field(column).type)
    wanted = {name for name in (key, status, title) if name}
    wanted |= set(small_columns(schema)) if where is not None else set()
    columns = [*sorted(wanted), *([f"{column}.path"] if has_path else ())]
    first = 0
    with open_parquet(file) as parquet:
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            rows = parquet.read_row_group(group, columns=columns) if columns else None
            values = {name: rows[name].to_pylist() for name in wanted} if rows else {}
            paths = rows[column].to_pylist() if rows and has_path else []
            addresses = [f"{below}#{first + row}" for row in range(count)]
            first += count
            names = (values[title] if title else None) or [None] * count
            if has_path:
                inner = [value and value["path"] for value in paths]
                names = [a or b for a, b in zip(inner, names, strict=True)]
            found = values[key] if key else [None] * count
            table = pa.table(
                {
                    "key": [
                        key_of(address) if value is None else _key(value, key)
                        for value, address in zip(found, addresses, strict=True)
                    ],
                    "name": [str(n) if n else a for n, a in zip(names, addresses, strict=True)],
                    "image": [{"bytes": None, "path": path}] * count,
                    "offset": pa.nulls(count, pa.int64()),
                    "size": pa.nulls(count, pa.int64()),
                    "group": [group] * count,
                    "row": range(count),
                    "status": values[status] if status else [OK] * count,
                },
                LISTED_ROW,
            )
            if where is not None and rows is not None:
                table = table.filter(pa.array(where.mask(rows.select(sorted(wanted)))))
            yield table


def _key(value: Any, column: str | None) -> int:
    if isinstance(value, int):
        return int(np.int64(np.uint64(value % 2**64)))  # uint64 keeps its bits
    return url_key(value) if column in ("url", "URL") else key_of(str(value))


def _image_files(source: Source) -> Iterator[dict[str, Any]]:
    root = source.root
    if source.files:
        yield from (_file_row(root, _below(file, root), None, root) for file in source.files)
    elif is_file(root):
        yield listed_row(root.name, str(root), None, None)
    else:
        for inside, names in walk(root):
            for name, size in names:
                if is_image(name):
                    yield _file_row(inside, name, size, root)


def _file_row(inside: Path, name: str, size: int | None, root: Path) -> dict[str, Any]:
    below = _below(inside, root)
    address = f"{below}/{name}" if below else name
    text = as_utf8(address)
    if text != address:  # no string of Arrow holds it, and so no row could find it
        size = UNNAMED
    return listed_row(text, as_utf8(str(inside / name)), None, size, key_of(address))


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, LISTED_ROW)


def _below(path: Path, root: Path) -> str:
    """The path below `root`, with slashes; empty for the root itself."""
    if is_url(path):  # whose parts leave out folders without a name: two paths would be one
        return str(path)[len(str(root).rstrip("/")) + 1 :]
    return "/".join(path.parts[len(root.parts) :])
