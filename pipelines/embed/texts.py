"""The texts of a job over captions: rows of our own tables as they are, others listed once.

A listing holds `key`, `name`, the text and `status`, so that a condition is evaluated once and the rows
of another tool have keys. Texts are small, unlike images: they are copied.

    source                                          key
    our tables; Parquet                             `key`, or `data.key_column`
    CSV, TSV, JSONL, JSON                           the same, else the hash of `name`
    JSON of captions by file name, COCO's           the hash of the file name, as in a listed folder of
    annotations                                     these files

Of several captions of an image, the first one of the list is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.images.conditions import Where, small_columns
from pipelines.images.listed_rows import row_keys
from pipelines.images.listing import DESCRIPTION, FOLDER
from pipelines.images.random_access import NAMES
from pipelines.images.rows import OK, check_status, require_columns
from pipelines.images.scores import Scores, scores_fingerprint
from pipelines.images.sources import is_integer
from pipelines.lists.input_files import input_files
from pipelines.lists.metadata import as_text
from pipelines.lists.readers import format_of, read_parquet, read_tables
from pipelines.storage.banding import begins_group
from pipelines.storage.files import is_file, is_url, write_atomically
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.folders import files_below, remove_folder
from pipelines.storage.parquet import read_schema, write_parquet
from pipelines.storage.sorting import ExternalSort, spread_keys
from pipelines.storage.tables import PLAN, Table, parquet_files, read_json_object
from vlv_model.errors import DataError

_BATCH_ROWS = 1 << 15
_ROW_GROUP = 1024


def list_texts(
    output: Path,
    path: str,
    column: str,
    key_column: str | None = None,
    where: str | None = None,
    again: bool = False,
    features: Sequence[str] = (),
) -> tuple[list[Path], dict[str, Any]]:
    """The Parquet files with the texts at `path`, and the settings that identify them.

    The counterpart of `list_images`; the caller must hold the lock on `output`. Raises DataError if
    there are no rows, or the column or a key is missing.
    """
    own = Table(path).exists
    files = parquet_files(path) if own else input_files(path)
    if own and where is None and key_column is None:
        require_columns(read_schema(files[0]), ["key", column], str(files[0]))
        return files, {}
    request: dict[str, Any] = {
        "input": path,
        "text": column,
        "key": key_column,
        "where": where,
        "features": list(features),
    }
    identity = {
        "layout": "text",
        "files": size_fingerprint({file.name: file for file in files}),
        "scores": scores_fingerprint(features),
    }
    description = output / DESCRIPTION
    recorded = read_json_object(description) if is_file(description) else {}
    same_request = recorded.get("asked") == request
    # With a table, the caller compares the identity and refuses.
    may_list = not Table(output).exists or (again and same_request)
    if recorded != {"asked": request, **identity} and may_list:
        if not is_url(output):
            description.parent.mkdir(parents=True, exist_ok=True)
        # Until the listing is complete, it answers no request.
        write_atomically(description, json.dumps({"asked": request, "files": "unfinished"}))
        if not _write(output, files, column, key_column, where, features):
            what = f"no row for which {where}" if where is not None else "no row"
            raise DataError(f"data.input={path} has {what}")
        write_atomically(description, json.dumps({"asked": request, **identity}))
    found = [file for file in files_below(output / FOLDER) if file.suffix == PLAN]
    return found, {name: value for name, value in identity.items() if value is not None}


def _write(
    output: Path,
    files: list[Path],
    column: str,
    key_column: str | None,
    where: str | None,
    features: Sequence[str],
) -> int:
    remove_folder(output / FOLDER)
    if not is_url(output):
        (output / FOLDER).mkdir(parents=True)
    condition = Where(where) if where is not None else None
    rows = written = 0
    size = sum(file.stat().st_size for file in files)
    listed = ExternalSort(pa.schema([("key", pa.int64()), ("image", pa.int64()), ("name", pa.string()),
                                     (column, pa.string()), ("status", pa.string())]), size)  # fmt: skip
    try:
        with Scores(features) if features else nullcontext() as scores:
            for file in files:
                for table in _rows(file, column, key_column, condition, scores):
                    listed.add(table)
        for bucket in listed.sorted():  # equal keys in the order of the list
            keys = bucket["key"].to_numpy()
            table = bucket.filter(pa.array(begins_group(keys))) if len(keys) else bucket
            if table.num_rows:
                table = table.drop_columns(["key"]).rename_columns(
                    ["key", "name", column, "status"]
                )
                part = output / FOLDER / f"{written:06d}{PLAN}"
                write_parquet(part, table, row_group_size=_ROW_GROUP)
                rows, written = rows + table.num_rows, written + 1
    finally:
        listed.remove()
    return rows


def _rows(
    file: Path,
    column: str,
    key_column: str | None,
    condition: Where | None,
    scores: Scores | None,
) -> Iterator[pa.Table]:
    for rows in _batches(file, column, key_column, condition is None):
        key = key_column or _key_column(rows.schema, file)
        require_columns(rows.schema, [key, column], str(file))
        check_status(rows.schema, str(file))
        values = rows[key].to_pylist()
        if key == "key" and pa.types.is_string(rows.schema.field(key).type):  # of a text file
            values = _integers(values, file)
        keys = np.array(row_keys(values, key), np.int64)
        name = next((n for n in NAMES if n in rows.column_names), None)
        texts = as_text(rows[column], f"{file}: column '{column}'")
        listed = pa.table(
            {
                "key": spread_keys(keys),  # a name's hash is spread, a foreign key may not be
                "image": keys,
                "name": rows[name].cast(pa.string()) if name else [str(k) for k in keys],
                column: pa.array([_first(text) for text in texts.to_pylist()], pa.string()),
                "status": rows["status"] if "status" in rows.column_names else [OK] * len(keys),
            }
        )
        if condition is not None:
            joined = scores.join(rows, keys) if scores else rows
            listed = listed.filter(pa.array(condition.mask(joined)))
        yield listed


def _batches(file: Path, column: str, key_column: str | None, few: bool) -> Iterator[pa.Table]:
    """The rows of a file in batches, without images; `few`: only the columns that a listing needs."""
    if format_of(file) != ".parquet":
        yield from (rows for rows in read_tables(file) if rows.num_rows)
        return
    schema = read_schema(file)
    wanted = {"key", "status", *NAMES} if few else set(small_columns(schema))
    wanted |= {column, key_column or "key"}
    yield from read_parquet(file, [name for name in schema.names if name in wanted], _BATCH_ROWS)


def _key_column(schema: pa.Schema, file: Path) -> str:
    is_text = format_of(file) != ".parquet"
    if is_integer(schema, "key") or (is_text and "key" in schema.names):
        return "key"
    if is_text and "name" in schema.names:
        return "name"
    raise DataError(
        f"{file} has no column `key` of integers: name one with data.key_column (`url` gives the "
        f"keys of ingest); it has {', '.join(schema.names)}"
    )


def _integers(values: list[str | None], file: Path) -> list[int | None]:
    try:
        return [None if value is None else int(value) for value in values]
    except ValueError:
        raise DataError(
            f"{file}: column 'key' has other values than integers: name another by data.key_column"
        ) from None


def _first(text: str | None) -> str | None:
    """The first of a list of captions, which a JSON file gives as JSON; another text as it is."""
    if text is not None and text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            return text
        if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
            return str(found[0])
    return text
